"""Merging: numbers that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfed.errors import UnknownNameError
from retrieval.merging import by_name, by_rank, by_score, cori, reciprocal_ranks

NONE = -np.inf
# One query, two owners, three hits at most.
SCORES = np.array([[[9.0, 6.0, 3.0], [0.8, 0.4, NONE]]])
WEIGHTS = np.array([[0.25, 0.75]])


def test_reciprocal_ranks_sum_over_lists() -> None:
    merged = reciprocal_ranks([["a", "b"], ["b", "c"], ["b"]])

    assert merged == [
        ("b", pytest.approx(1 / 62 + 1 / 61 + 1 / 61)),
        ("a", pytest.approx(1 / 61)),
        ("c", pytest.approx(1 / 62)),
    ]
    assert reciprocal_ranks([]) == []


def test_cosines_of_one_encoder_stay_as_they_are() -> None:
    assert np.array_equal(by_score(SCORES, WEIGHTS), SCORES)


def test_cori_rescales_by_the_owners_range_and_its_weight() -> None:
    """Within owners: 1, 1/2, 0 and 1, 0. Between them: 0 and 1. So (D + 0.4 D C) / 1.4."""
    merged = cori(SCORES, WEIGHTS)

    assert merged[0, 0] == pytest.approx([1 / 1.4, 0.5 / 1.4, 0.0])
    assert merged[0, 1, :2] == pytest.approx([1.0, 0.0])
    assert merged[0, 1, 2] == NONE


def test_cori_looks_at_the_owners_that_found_something() -> None:
    scores = np.array([[[2.0, 1.0], [NONE, NONE], [5.0, 5.0]]])

    merged = cori(scores, np.array([[0.2, 0.7, 0.1]]))

    assert merged[0, 0] == pytest.approx([1.0, 0.0])
    assert (merged[0, 1] == NONE).all()
    assert merged[0, 2] == pytest.approx([1 / 1.4, 1 / 1.4])  # all of an owner's alike: each is its best


def test_ranks_go_round_the_owners_the_likelier_first() -> None:
    merged = by_rank(SCORES, WEIGHTS)

    order = np.argsort(-merged[0].ravel(), kind="stable")
    assert order[:5].tolist() == [3, 0, 4, 1, 2]
    assert merged[0, 0] == pytest.approx([1 / 61, 1 / 62, 1 / 63])


@pytest.mark.parametrize("merge", [by_score, cori, by_rank])
@given(st.data())
def test_a_merge_keeps_each_owners_order_and_adds_no_hit(merge: Any, data: st.DataObject) -> None:
    n, n_owners, k = (data.draw(st.integers(1, 4)) for _ in range(3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    scores = -np.sort(-rng.normal(size=(n, n_owners, k)).round(1), axis=2)
    scores[np.arange(k) >= rng.integers(0, k + 1, size=(n, n_owners))[:, :, None]] = NONE

    merged = merge(scores, rng.dirichlet(np.ones(n_owners), size=n))

    assert np.array_equal(np.isfinite(merged), np.isfinite(scores))
    with np.errstate(invalid="ignore"):
        steps = np.diff(merged, axis=2)
    assert not (steps[np.isfinite(steps)] > 0).any()


def test_a_merge_by_its_name() -> None:
    assert (by_name("score"), by_name("cori"), by_name("rank")) == (by_score, cori, by_rank)
    with pytest.raises(UnknownNameError, match="did you mean 'rank'"):
        by_name("ranks")
