"""N-grams and their mutual information, by numbers that can be counted by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfed.prompts.ngrams import candidates, counted, joined, ngrams_of, pmi, ranked

TEXTS = ("New York is big.", "I love New York!", "York is old", "A new day", "I am old")


def test_ngrams_of_a_text_by_hand() -> None:
    assert ngrams_of("I can't wait. Well-made!", 2) == {"i", "can't", "wait", "i can't", "can't wait", "well-made"}
    assert ngrams_of("", 3) == frozenset()
    assert ngrams_of("url_removed 24 times", 3) == {"times"}


def test_an_ngram_does_not_go_beyond_a_clause() -> None:
    assert "big why" not in ngrams_of("It is big, why?", 2)
    assert ngrams_of("one\ntwo", 2) == {"one", "two"}


@given(text=st.text(max_size=60))
def test_every_ngram_is_of_few_words_and_stands_in_its_own_text(text: str) -> None:
    for ngram in ngrams_of(text, 3):
        assert 1 <= len(ngram.split()) <= 3
        assert "{" not in ngram


def test_a_text_counts_once() -> None:
    counts = counted(["so so so", "so"], 2)

    assert counts == {"so": 2, "so so": 1}


def test_pmi_by_hand() -> None:
    """Of 5 texts, "new" stands in 3, "york" in 3, and "new york" in 2."""
    counts = counted(TEXTS, 3)

    assert (counts["new"], counts["york"], counts["new york"]) == (3, 3, 2)
    assert pmi("new york", counts, 5) == pytest.approx(math.log((2 / 5) / (3 / 5) / (3 / 5)))
    assert pmi("i love new", counts, 5) == pytest.approx(math.log((1 / 5) / ((2 / 5) * (1 / 5) * (3 / 5))))
    assert pmi("york", counts, 5) == 0.0
    assert pmi("old york", counts, 5) == -math.inf


def test_candidates_bring_the_words_that_their_pmi_needs() -> None:
    found = candidates(["one two", "one two", "three"], 2, most=3)

    assert found == ["one", "two", "one two"]
    assert candidates(["one two", "one two", "three"], 2, most=2) == ["one"]


@given(texts=st.lists(st.text(alphabet="abc .", max_size=30), max_size=6), most=st.integers(0, 12))
def test_candidates_are_as_few_as_clients_count_and_hold_their_own_words(texts: list[str], most: int) -> None:
    found = candidates(texts, 3, most)

    assert len(set(found)) == len(found) <= most
    assert {word for ngram in found for word in ngram.split()} <= set(found)


def test_the_rank_is_the_share_of_the_mutual_information() -> None:
    """10 texts: "can't wait" (4 of 5 and 4) is frequent, "ice cream" (1 of 1 and 1) has the larger PMI; "of the" (3 of
    6 and 6) has a negative one and comes after the single words."""
    counts = {"can't": 5, "wait": 4, "can't wait": 4, "ice": 1, "cream": 1, "ice cream": 1, "of": 6, "the": 6}
    counts |= {"of the": 3, "never": 0}

    assert pmi("ice cream", counts, 10) > pmi("can't wait", counts, 10) > 0 > pmi("of the", counts, 10)
    # .4 log 2 = .28, .1 log 10 = .23; the words of these are in them already.
    assert ranked(counts, 10, 9) == ["can't wait", "ice cream", "of", "the", "never"]
    assert ranked(counts, 10, 1) == ["can't wait"]


def test_joined_stands_before_the_prompt() -> None:
    assert joined(["so far", "good"], "Text: {text}") == "so far good\n\nText: {text}"
