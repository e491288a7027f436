"""The leak gate: what it stops, rule by rule, and that it lets an honest instruction through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.common_words import COMMON_WORDS
from clients.gate import MAX_CHARS, MAX_WORDS, RUN, LeakGate, plain, tokens

PRIVATE = (
    "Dr. Zyzzyva said that the results of her work were good.",
    "Ask Bob or write to bob.quokka@example.org, room 117!",
    "The café's owner Renée is nearly always late, and it isn't her fault.",
)
KNOWN = ("Classify the sentiment of the text.", "negative", "positive")


def gate() -> LeakGate:
    return LeakGate(PRIVATE, KNOWN)


@pytest.mark.parametrize(
    "text",
    [
        "Classify the sentiment of the text as negative or positive.",
        "Consider the tone of the whole text, and judge whether its author is pleased.",
        "Say whether the results were good.",  # three words in a row of a private text, all of them common
        "Choose positive if it isn't negative.",
    ],
)
def test_an_honest_instruction_passes(text: str) -> None:
    assert gate().passes(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (PRIVATE[0], "a whole text"),
        ("Note that the RESULTS of -- her work matter.", "four words in a row, whatever stands between them"),
        ("Beware of Zyzzyva.", "a single name"),
        ("Beware of zyzzyva's view.", "its genitive"),
        ("Beware of Zyzzyvas.", "its plural"),
        ("Beware of Zyzzyv", "cut off"),
        ("Beware of z y z z y v a", "spelled"),
        ("Beware of zy-zzy_va", "broken up"),
        ("Beware of zy\u200bzzyva", "with an invisible character"),
        ("Beware of \uff3a\uff39\uff3a\uff3a\uff39\uff36\uff21", "in full-width letters"),
        ("Never trust Renee.", "without its accent"),
        ("Never trust Bob.", "a short name"),
        ("Look in room.", "a word of private texts only, if an ordinary one"),
        ("Count to 117.", "a number of theirs"),
        ("Count to 1-1-8.", "a number of nobody's"),
        ("Write to somebody@elsewhere", "an address"),
        ("See www.elsewhere", "an address"),
        ("See elsewhere.org", "an address"),
    ],
)
def test_it_stops(text: str, why: str) -> None:
    assert not gate().passes(text), why


def test_what_is_known_passes_even_if_private_texts_have_it() -> None:
    known = (*KNOWN, "Dr. Zyzzyva said that room 117 is at elsewhere.org")

    assert LeakGate(PRIVATE, known).passes("Dr. Zyzzyva said that room 117 is at elsewhere.org")
    assert not LeakGate(PRIVATE, known).passes("Zyzzyva said that the results were good.")  # another run of words


def test_a_private_text_of_two_or_three_common_words_is_quoted_as_a_whole() -> None:
    short = LeakGate(["Very bad.", "Good!", "It was so very good"], KNOWN)

    assert not short.passes("This is very bad indeed.")
    assert short.passes("This is very clear and good.")
    assert short.passes("So very good is positive.")  # three of five


def test_it_is_bounded() -> None:
    assert gate().passes(" ".join(["text"] * MAX_WORDS))
    assert not gate().passes(" ".join(["text"] * (MAX_WORDS + 1)))
    assert not gate().passes("." * (MAX_CHARS + 1))


def test_scripts_without_spaces_are_compared_character_by_character() -> None:
    assert not LeakGate(["昨日王先生が怒った。"], []).passes("文は王")
    assert tokens("王さん a") == ["王", "さ", "ん", "a"]


def test_plain_is_plain() -> None:
    assert plain("Don't SHOUT, Ren\u00e9e\u00ad!") == "dont shout, renee!"
    assert plain(plain("\u212b\U0001d400")) == plain("\u212b\U0001d400") == "aa"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Sørensen", "Sorensen"),
        ("Sørensen", "Soerensen"),
        ("Łódź", "Lodz"),
        ("Đorđe", "Dorde"),
        ("I\u015f\u0131k", "Isik"),
        ("Müller", "Mueller"),
        ("Mu\u0308ller", "MUELLER"),
        ("Mueller", "Mueller"),
        ("Ægir", "Aegir"),
    ],
)
def test_a_name_is_stopped_as_others_would_spell_it(name: str, written: str) -> None:
    assert not LeakGate([f"{name} was here."], []).passes(f"Ask {written}")
    assert not LeakGate([f"{name} was here."], []).passes(f"Ask {name}")


# ---------------------------------------------------------------- properties

word = st.text(alphabet="abcdefghijklmnopqrstuvwxyzäöéß", min_size=3, max_size=9)
common = st.sampled_from(sorted(word for word in COMMON_WORDS if len(word) > 1))  # letters may spell something
text = st.lists(word | common, min_size=RUN, max_size=15).map(" ".join)
frame = st.lists(common, max_size=6).map(" ".join)


@given(private=st.lists(text, min_size=1, max_size=5), before=frame, after=frame, data=st.data())
def test_no_run_of_a_private_text_passes(private: list[str], before: str, after: str, data: st.DataObject) -> None:
    words = tokens(plain(data.draw(st.sampled_from(private))))
    start = data.draw(st.integers(0, len(words) - RUN))
    run = data.draw(st.sampled_from([" ", ", ", "\n", " - "])).join(words[start : start + RUN])

    assert not LeakGate(private, KNOWN).passes(f"{before} {run.upper()} {after}")


@given(private=st.lists(text, min_size=1, max_size=5), secret=word, before=frame, after=frame)
def test_no_word_of_private_texts_alone_passes(private: list[str], secret: str, before: str, after: str) -> None:
    canary = f"{secret}xq"  # no common word ends so

    assert not LeakGate([*private, f"It was {canary}."], KNOWN).passes(f"{before} {canary.title()} {after}")


@given(private=st.lists(text, min_size=1, max_size=5), written=st.lists(common, min_size=1, max_size=20))
def test_words_that_everybody_uses_pass_unless_they_quote(private: list[str], written: list[str]) -> None:
    runs = {tuple(w[i : i + RUN]) for w in map(tokens, map(plain, private)) for i in range(len(w) - RUN + 1)}
    quotes = any(tuple(written[i : i + RUN]) in runs for i in range(len(written)))

    assert LeakGate(private, KNOWN).passes(" ".join(written)) != quotes


@given(texts=st.lists(st.text(max_size=60), max_size=4), written=st.text(max_size=80))
def test_it_takes_any_text(texts: list[str], written: str) -> None:
    LeakGate(texts, KNOWN).passes(written)


@given(texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=4), data=st.data())
def test_a_text_itself_passes_only_if_it_is_one_word_that_everybody_uses(texts: list[str], data: st.DataObject) -> None:
    quoted = data.draw(st.sampled_from(texts))

    if LeakGate(texts, ()).passes(quoted):
        words = tokens(plain(quoted))
        assert set(words) <= COMMON_WORDS
        assert len(words) <= 1
