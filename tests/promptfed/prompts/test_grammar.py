"""Drafts: how they are put together, recombined and told apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.prompts.grammar import (
    FIELDS,
    FRAMES,
    Draft,
    Materials,
    crossover,
    edit,
    named_fields,
    random_draft,
    similarity,
    usable_exemplar,
)
from promptfed.prompts.template import SLOT

WORDS = ("bad", "good")
MATERIALS = Materials(
    instructions=("Judge.", ""),
    fields=FIELDS,
    exemplars=(("It was awful.", "It is dull.", "So sad."), ("It was fine.", "This is fun.")),
    words=WORDS,
    other_words=(("poor", "weak"), ("great", "strong")),
)
BARE = Materials(instructions=("",), fields=(("Text", "Label"),), exemplars=((), ()), words=WORDS, other_words=((), ()))


def draft(**changes: object) -> Draft:
    values = {
        "instruction": "Judge.",
        "fields": ("Text", "Label"),
        "exemplars": (("It was awful.", 0), ("It was fine.", 1)),
        "words": WORDS,
        **changes,
    }
    return Draft(**values)  # type: ignore[arg-type]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_made_of(d: Draft, materials: Materials) -> None:
    assert d.instruction in materials.instructions
    assert d.fields in materials.fields
    assert all(text in materials.exemplars[label] for text, label in d.exemplars)
    assert len(set(d.words)) == len(d.words) == 2
    own = all(w in (materials.words[k], *materials.other_words[k]) for k, w in enumerate(d.words))
    assert own


# ---------------------------------------------------------------- from draft to prompt


def test_a_draft_as_text_by_hand() -> None:
    assert draft().template().text == (
        "Judge.\n\nText: It was awful.\nLabel: bad\n\nText: It was fine.\nLabel: good\n\nText: {text}\nLabel:"
    )
    assert draft().template().words == WORDS
    assert draft().template().separator == " "


def test_parts_that_are_empty_leave_no_trace() -> None:
    assert draft(instruction="", exemplars=(), fields=("Input", "Output")).template().text == "Input: {text}\nOutput:"


def test_exemplars_are_labelled_with_the_words_of_the_draft() -> None:
    text = draft(words=("poor", "great"), exemplars=(("Fine.", 1),)).template().text

    assert "Text: Fine.\nLabel: great\n" in text


def test_fields_and_frames_are_distinct() -> None:
    assert len(set(FIELDS)) == len(FIELDS)
    assert len(set(FRAMES)) == len(FRAMES)


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("two words", True),
        ("one", False),
        ("", False),
        ("a b c d e", True),
        ("a b c d e f", False),
        ("two\nlines", False),
        (f"with a {SLOT}", False),
    ],
)
def test_usable_exemplars(text: str, usable: bool) -> None:
    assert usable_exemplar(text, max_words=5) is usable


# ---------------------------------------------------------------- random drafts


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_a_random_draft_has_one_exemplar_of_each_label(seed: int) -> None:
    d = random_draft(MATERIALS, rng(seed))

    assert_made_of(d, MATERIALS)
    assert sorted(label for _, label in d.exemplars) == [0, 1]
    d.template()  # a valid prompt


def test_all_parts_and_orders_are_drawn() -> None:
    drafts = [random_draft(MATERIALS, rng(seed)) for seed in range(300)]

    assert {d.fields for d in drafts} == set(FIELDS)
    assert {d.instruction for d in drafts} == {"Judge.", ""}
    assert {text for d in drafts for text, _ in d.exemplars} == {t for texts in MATERIALS.exemplars for t in texts}
    assert {tuple(label for _, label in d.exemplars) for d in drafts} == {(0, 1), (1, 0)}
    given_words = sum(d.words == WORDS for d in drafts)
    assert 110 < given_words < 190  # half of the time, give or take


def test_without_materials_a_draft_is_bare() -> None:
    assert random_draft(BARE, rng()) == draft(instruction="", exemplars=())


def test_other_words_are_used_only_where_every_label_has_some() -> None:
    half = Materials(instructions=("",), fields=FIELDS, exemplars=((), ()), words=WORDS, other_words=(("poor",), ()))

    assert {half.draw_words(rng(s)) for s in range(30)} == {WORDS}


def test_a_label_is_mostly_read_off_all_its_words() -> None:
    drawn = [MATERIALS.draw_readout(rng(s)) for s in range(400)]

    assert set(drawn) == {(), (("bad", "poor", "weak"), ("good", "great", "strong"))}
    assert 270 < sum(map(bool, drawn)) < 330  # three in four, give or take
    assert {BARE.draw_readout(rng(s)) for s in range(30)} == {()}


def test_words_that_are_shown_are_not_read_off_twice() -> None:
    readout = (("bad", "poor"), ("good", "great"))

    assert draft(readout=readout).template().by_label == (("bad", "poor"), ("good", "great"))
    assert draft(readout=readout, words=("poor", "good")).template().by_label == (("poor", "bad"), ("good", "great"))
    assert draft().template().synonyms == ()


# ---------------------------------------------------------------- crossover and edit


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=100)
def test_a_child_has_each_part_from_one_of_its_parents(seed: int) -> None:
    r = rng(seed)
    a, b = random_draft(MATERIALS, r), random_draft(MATERIALS, r)

    child = crossover(a, b, r)

    assert child.instruction in (a.instruction, b.instruction)
    assert child.fields in (a.fields, b.fields)
    assert child.words in (a.words, b.words)
    assert set(child.exemplars) <= set(a.exemplars) | set(b.exemplars)
    # Label by label from one parent: never a mixture within a label.
    for label in (0, 1):
        mine = {e for e in child.exemplars if e[1] == label}
        assert any(mine <= {e for e in parent.exemplars if e[1] == label} for parent in (a, b))
    child.template()


def test_equal_parents_have_their_own_likeness() -> None:
    assert all(crossover(draft(), draft(), rng(s)) == draft() for s in range(20))


def test_children_differ() -> None:
    a = draft()
    b = draft(instruction="", fields=("Input", "Output"), exemplars=(("So sad.", 0), ("This is fun.", 1)))

    children = {crossover(a, b, rng(s)) for s in range(200)}

    # 2 instructions x 2 fields x 2 exemplars of each of 2 labels
    assert len(children) == 16


@given(seed=st.integers(0, 10_000), bare=st.booleans())
@settings(deadline=None, max_examples=100)
def test_an_edit_changes_one_part_at_most(seed: int, bare: bool) -> None:
    r = rng(seed)
    before = draft(exemplars=()) if bare else random_draft(MATERIALS, r)

    after = edit(before, MATERIALS, r)

    assert_made_of(after, MATERIALS)
    changed = [
        before.instruction != after.instruction,
        before.fields != after.fields,
        before.words != after.words,
        before.exemplars != after.exemplars,
    ]
    assert sum(changed) <= 1
    assert len(set(after.exemplars)) == len(after.exemplars) == len(before.exemplars)
    # One exemplar gave way to another of its label, or the order changed: nothing else.
    if sorted(before.exemplars) != sorted(after.exemplars):
        swapped = [(x, y) for x, y in zip(before.exemplars, after.exemplars, strict=True) if x != y]
        assert len(swapped) == 1
        assert swapped[0][0][1] == swapped[0][1][1]


def test_every_kind_of_edit_occurs() -> None:
    before = draft()
    after = [edit(before, MATERIALS, rng(s)) for s in range(300)]

    assert any(d.instruction != before.instruction for d in after)
    assert any(d.fields != before.fields for d in after)
    assert any(d.words != before.words for d in after)
    assert any(d.exemplars == before.exemplars[::-1] for d in after)
    assert any(set(d.exemplars) != set(before.exemplars) for d in after)


def test_with_nothing_to_change_an_edit_changes_nothing() -> None:
    before = draft(instruction="", exemplars=())

    assert {edit(before, BARE, rng(s)) for s in range(30)} == {before}


# ---------------------------------------------------------------- names of fields


def test_what_the_instruction_asks_for_names_a_field() -> None:
    assert named_fields("Classify the sentiment of the text.") == (
        ("Text", "Sentiment"),
        ("Input", "Sentiment"),
        ("Sentence", "Sentiment"),
    )
    assert named_fields("For the text, name THE topic.")[0] == ("Text", "Topic")
    assert named_fields("Sentiment of the sentence?") == ()  # the input is not what is asked for
    assert named_fields("Ordne den Text einem Thema zu.") == ()
    assert named_fields("") == ()


# ---------------------------------------------------------------- similarity


def test_similarity_by_hand() -> None:
    assert similarity(draft(), draft()) == 1.0
    # Fields and words alike, 1 of 3 exemplars in common: 1/2 + 1/4 + 1/4 * 1/3
    assert similarity(draft(), draft(exemplars=(("It was awful.", 0), ("This is fun.", 1)))) == pytest.approx(5 / 6)
    other = draft(fields=("Input", "Output"), words=("poor", "great"), exemplars=(("So sad.", 0),))
    assert similarity(draft(), other) == 0.0
    # Order and instruction do not count.
    assert similarity(draft(), draft(instruction="", exemplars=draft().exemplars[::-1])) == 1.0
    assert similarity(draft(exemplars=()), draft(exemplars=())) == 1.0


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_similarity_is_even_handed(seed: int) -> None:
    r = rng(seed)
    a, b = random_draft(MATERIALS, r), random_draft(MATERIALS, r)

    assert similarity(a, b) == similarity(b, a)
    assert 0.0 <= similarity(a, b) <= 1.0


def test_half_of_the_drafts_have_a_contrast_side_by_side_in_place_of_other_exemplars_of_its_labels() -> None:
    three = replace(
        MATERIALS,
        exemplars=(*MATERIALS.exemplars, ("It was so-so.",)),
        words=("bad", "good", "fair"),
        other_words=((), (), ()),
        contrasts=((("It was not fun.", 0), ("It was not dull.", 1)),),
    )

    drafts = [random_draft(three, rng(seed)) for seed in range(200)]

    with_contrast = [d for d in drafts if ("It was not fun.", 0) in d.exemplars]
    assert 70 < len(with_contrast) < 130
    for d in drafts:
        assert sorted(label for _, label in d.exemplars) == [0, 1, 2]
    for d in with_contrast:
        places = [d.exemplars.index(exemplar) for exemplar in three.contrasts[0]]
        assert abs(places[0] - places[1]) == 1


def test_a_seed_draws_what_it_drew_when_the_published_figures_were_measured() -> None:
    assert random_draft(MATERIALS, rng(8)) == Draft(
        instruction="Judge.",
        fields=("Sentence", "Label"),
        exemplars=(("So sad.", 0), ("It was fine.", 1)),
        words=("poor", "strong"),
        readout=(("bad", "poor", "weak"), ("good", "great", "strong")),
    )
