"""Exemplars of a generation task: what the model agrees with itself on, from public texts alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from promptfed.messages import Written
from promptfed.prompts.grammar import MAX_PAIRS, Draft, Materials, crossover, edit, random_draft, similarity
from promptfed.strategies.proposal_answers import SHOWN, agreed, gather_pairs, usable_answer
from promptfed.strategies.session import Session
from tests.answering import TASK, AnsweringFM, public_questions
from tests.support import bench, finish, replies

PAIRS = tuple((f"Text {i}?", f"answer {i}") for i in range(8))
MATERIALS = Materials(
    instructions=("Do.", "Do it."), fields=(("A", "B"), ("C", "D")), exemplars=(), words=(), other_words=(), pairs=PAIRS
)


def test_agreed_by_hand() -> None:
    texts = ("Ada has a red lamp.", "Boris has a clock.", "Clara is out.", "Nobody knows.", "Long.")
    answers = [
        ("red lamp", "clock", "gone", "", "one two three four five six seven eight nine"),
        ("the red lamp", "watch", "away", "yes", "one two three four five six seven eight nine"),
        ("lamp", "tent", "away", "no", ""),
    ]

    # Two say "red lamp", and it stands there: 3. Two say "away", which does not: 2. One says "clock", which does: 2,
    # and it comes first as the earlier of equals. "yes" has nothing for it, and nine words are too many.
    assert agreed(texts, answers) == [
        ("Ada has a red lamp.", "red lamp"),
        ("Boris has a clock.", "clock"),
        ("Clara is out.", "away"),
    ]
    assert agreed((), ()) == []


def test_usable_answers_are_short_and_say_something() -> None:
    assert [usable_answer(a) for a in ("red lamp", "", "the", "of {text}", "a b c d e f g h i")] == [
        True,
        False,
        False,
        False,
        False,
    ]


def test_it_asks_about_public_texts_only_within_its_share_and_finds_right_answers() -> None:
    scene = bench(3, 20, fm=AnsweringFM(), max_fm_calls=1000, **TASK)
    session = Session(scene.federation())

    materials = scene.drive(gather_pairs(session, np.random.default_rng(1)), 1000)

    assert 0 < session.spent <= 0.08 * 1000
    n, shown = len(materials.pairs) - len(SHOWN), materials.pairs[-len(SHOWN) :]
    assert 3 <= n <= 12
    assert shown == SHOWN
    assert {text for text, _ in materials.pairs[:n]} <= set(public_questions())
    assert all(f"keeps the {answer} in" in text for text, answer in materials.pairs[:n])
    assert all(r.prompt.count("shelf 500") >= 1 for r in scene.fm.requests)  # type: ignore[union-attr]


def test_without_public_texts_or_answers_there_are_the_pairs_that_are_about_nothing() -> None:
    for public, text in (((), "red lamp"), (public_questions(), "")):
        scene = bench(2, 5, fm=AnsweringFM(), max_fm_calls=400, **{**TASK, "public": public})
        session = Session(scene.federation())

        _, materials = finish(
            gather_pairs(session, np.random.default_rng(1)),
            lambda r, text=text: replies({c: Written(texts=(text,) * r.grants[c]) for c in r.tasks}),
        )

        assert materials.pairs == SHOWN
        assert len(materials.instructions) == 4


# ---------------------------------------------------------------- drafts


def test_a_draft_with_pairs_by_hand() -> None:
    draft = Draft(instruction="Do.", fields=("A", "B"), exemplars=(), words=(), pairs=PAIRS[:2])

    template = draft.template()

    assert template.text == "Do.\n\nA: Text 0?\nB: answer 0\n\nA: Text 1?\nB: answer 1\n\nA: {text}\nB:"
    assert template.words == ()


def test_drafts_vary_in_number_choice_and_order_of_pairs_and_hold_none_twice() -> None:
    rng = np.random.default_rng(0)
    drafts = [random_draft(MATERIALS, rng) for _ in range(40)]
    children = [crossover(a, b, rng) for a, b in pairwise(drafts)]
    edited = [edit(child, MATERIALS, rng) for child in children]

    assert {len(d.pairs) for d in drafts} == set(range(1, MAX_PAIRS + 1))
    for draft in [*drafts, *children, *edited]:
        assert len(set(draft.pairs)) == len(draft.pairs) <= MAX_PAIRS
        assert set(draft.pairs) <= set(PAIRS)
        assert draft.words == ()
    changes = {len(after.pairs) - len(before.pairs) for before, after in zip(children, edited, strict=True)}
    assert changes == {-1, 0, 1}
    parents = pairwise(drafts)
    assert all(set(c.pairs) <= {*a.pairs, *b.pairs} for c, (a, b) in zip(children, parents, strict=True))


def test_likeness_counts_shared_pairs() -> None:
    a, b = (Draft(instruction="", fields=("A", "B"), exemplars=(), words=(), pairs=PAIRS[i : i + 2]) for i in (0, 1))

    assert similarity(a, a) == 1.0
    assert similarity(a, b) == 0.5 + 0.25 + 0.25 / 3  # one pair of three is shared
