"""Templates: one slot, replaced once, nothing else interpreted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import ConfigError
from promptfed.prompts.template import SLOT, PromptTemplate, content_hash
from promptfed.types import FMResponse, TextRequest

WORDS = ("bad", "good")


def whole(template: PromptTemplate, text: str) -> str:
    (request,) = template.requests([text])
    return request.prefix + request.text + request.suffix


def test_requests_by_hand() -> None:
    template = PromptTemplate(text="Say which.\n\nText: {text}\nLabel:", words=WORDS)

    first, second = template.requests(["fine", "poor"])

    assert (first.prefix, first.text, first.suffix) == ("Say which.\n\nText:", " fine", "\nLabel:")
    assert first.labels == (" bad", " good")
    assert second.prefix == first.prefix
    assert second.text == " poor"


def test_the_separator_stands_before_each_word() -> None:
    template = PromptTemplate(text="{text}", words=WORDS, separator="\n- ")

    assert template.requests(["x"])[0].labels == ("\n- bad", "\n- good")


@pytest.mark.parametrize("text", ["{text}", "{0} {} %s {text} {{text}}", "{", "\\", "$1", "\x00", "😀", ""])
def test_whatever_a_text_holds_is_passed_on_as_it_is(text: str) -> None:
    template = PromptTemplate(text="Text: {text} <{}>", words=WORDS)

    assert whole(template, text) == f"Text: {text} <{{}}>"


@given(before=st.text(max_size=20), after=st.text(max_size=20), text=st.text(max_size=20))
@settings(deadline=None, max_examples=50)
def test_the_parts_joined_are_the_prompt_with_the_text_in_its_slot(before: str, after: str, text: str) -> None:
    source = before + SLOT + after
    if source.count(SLOT) != 1:
        return

    assert whole(PromptTemplate(text=source, words=WORDS), text) == before + text + after


@given(before=st.text(alphabet=" ab\n", max_size=8))
@settings(deadline=None, max_examples=50)
def test_no_prefix_ends_in_a_blank(before: str) -> None:
    (request,) = PromptTemplate(text=before + SLOT, words=WORDS).requests(["x"])

    assert not request.prefix.endswith(" ")


@pytest.mark.parametrize(("text", "found"), [("no slot", 0), ("{text} and {text}", 2), ("", 0), ("{Text}", 0)])
def test_a_prompt_without_exactly_one_slot_is_refused(text: str, found: int) -> None:
    with pytest.raises(ConfigError, match=rf"\{{text\}} exactly once; found {found}"):
        PromptTemplate(text=text, words=WORDS)


@pytest.mark.parametrize("words", [("one",), ("same", "same"), ("good", ""), ("good", "  ")])
def test_label_words_that_do_not_tell_labels_apart_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="label words"):
        PromptTemplate(text="{text}", words=words)


def test_a_prompt_without_label_words_asks_for_a_line_of_text() -> None:
    template = PromptTemplate(text="Q: {text}\nA:", words=())

    (request,) = template.requests(["who {text}?"])
    said = template.answers([FMResponse(text=" Ada \nQ: next"), FMResponse(text=""), FMResponse(error="no")])

    assert request == TextRequest(prompt="Q: who {text}?\nA:", max_tokens=24, temperature=0.0, stop=("\n",))
    assert said == ["Ada", "", None]


def test_the_id_is_of_the_content() -> None:
    template = PromptTemplate(text="a {text}", words=WORDS)

    assert template.prompt_id == PromptTemplate(text="a {text}", words=WORDS).prompt_id
    assert len(template.prompt_id) == 12
    others = [
        PromptTemplate(text="b {text}", words=WORDS),
        PromptTemplate(text="a {text}", words=("good", "bad")),
        PromptTemplate(text="a {text}", words=WORDS, separator=""),
        PromptTemplate(text="a {text}", words=WORDS, synonyms=(("poor",), ("great",))),
        PromptTemplate(text="a {text}", words=WORDS, synonyms=(("poor", "great"), ())),
    ]
    assert len({template.prompt_id, *(o.prompt_id for o in others)}) == 6


@pytest.mark.parametrize(
    "synonyms", [(("poor",),), (("poor",), ("poor",)), (("bad",), ()), (("good",), ()), ((" ",), ())]
)
def test_synonyms_that_do_not_tell_labels_apart_are_refused(synonyms: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="label"):
        PromptTemplate(text="{text}", words=("bad", "good"), synonyms=synonyms)


# ---------------------------------------------------------------- label scores


def answer(*logprobs: float) -> FMResponse:
    return FMResponse(logprobs=logprobs)


def test_a_label_score_is_the_mean_over_its_words_normalised() -> None:
    template = PromptTemplate(text="{text}", words=("bad", "good"), synonyms=(("poor", "weak"), ()))

    (request,) = template.requests(["it"])
    scores = template.label_scores([answer(-1.0, -2.0, -3.0, -4.0)])

    assert request.labels == (" bad", " poor", " weak", " good")
    # Means -2 and -4; log(e^-2 + e^-4) = -2 + log(1 + e^-2)
    assert scores[0].tolist() == pytest.approx([-0.126928, -2.126928], abs=1e-6)


def test_without_synonyms_normalised_scores_stay_as_they_are() -> None:
    template = PromptTemplate(text="{text}", words=("bad", "good"))

    assert template.label_scores([answer(np.log(0.2), np.log(0.8))])[0].tolist() == pytest.approx(np.log([0.2, 0.8]))


def test_with_a_readout_a_label_score_is_the_weighted_sum_over_its_words() -> None:
    template = PromptTemplate(
        text="{text}", words=("bad", "good"), synonyms=(("poor", "weak"), ()), readout=(0.5, 0.0, 0.25, 1.0)
    )

    scores = template.label_scores([answer(-1.0, -2.0, -3.0, -4.0)])

    # Sums -0.5 - 0.75 = -1.25 and -4: a difference of 2.75.
    assert scores[0, 0] - scores[0, 1] == pytest.approx(2.75)
    assert np.exp(scores[0]).sum() == pytest.approx(1.0)


def test_a_readout_is_no_part_of_what_the_model_is_asked() -> None:
    plain = PromptTemplate(text="{text}", words=("bad", "good"))
    weighed = PromptTemplate(text="{text}", words=("bad", "good"), readout=(0.3, 1 / 3))

    assert weighed.prompt_id == plain.prompt_id
    assert weighed.requests(["it"]) == plain.requests(["it"])
    assert weighed != plain
    assert weighed.readout == (float(np.float32(0.3)), float(np.float32(1 / 3)))  # as it is on the wire


def test_a_readout_has_a_weight_for_each_word() -> None:
    with pytest.raises(ConfigError, match="readout has 1 weights for 2 label words"):
        PromptTemplate(text="{text}", words=("bad", "good"), readout=(1.0,))


def test_words_are_sources_that_speak_for_their_label_alone() -> None:
    """Weighed as sources they give the label scores, up to what all labels have in common."""
    template = PromptTemplate(
        text="{text}", words=("bad", "good"), synonyms=(("poor",), ("fine",)), readout=(0.5, 1.5, 1.0, 1.0)
    )
    words = np.array([[-1.0, -2.0, -3.0, -4.0], [-4.0, -2.0, -1.0, -2.0]])

    sources = template.word_sources(words)

    assert template.word_labels.tolist() == [0, 0, 1, 1]
    assert sources[0].tolist() == [[1.5, 0.0], [0.5, 0.0], [0.0, -0.5], [0.0, -1.5]]
    together = np.einsum("j,njk->nk", template.readout, sources)
    merged = template.merged(words)
    assert together[:, 0] - together[:, 1] == pytest.approx(merged[:, 0] - merged[:, 1])


@pytest.mark.parametrize("bad", [(np.nan, -1.0), (-np.inf, 0.0), (np.inf, 0.0)])
def test_an_answer_that_is_not_finite_or_failed_is_masked_alone_and_uniform(bad: tuple[float, float]) -> None:
    template = PromptTemplate(text="{text}", words=("bad", "good"))

    scores = template.label_scores([answer(-0.5, -1.0), answer(*bad), FMResponse(error="no")])

    assert np.ma.getmaskarray(scores).tolist() == [[False, False], [True, True], [True, True]]
    assert scores.data[1:] == pytest.approx(np.full((2, 2), -np.log(2)))


def test_content_hash_is_sha256_of_canonical_json() -> None:
    # sha256('{"a":1,"b":[2]}'), from sha256sum
    assert content_hash({"b": [2], "a": 1}, 64) == "0855bfc20eb6cfaa4be7d6b510c63dd22997718bddadcb1a4915cec3a16145b9"
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": (2,), "a": 1})
