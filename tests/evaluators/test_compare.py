"""Paired comparison: hand-checkable differences, and intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from evaluators.compare import compare, holm, mean_interval
from promptfed.errors import DataError


def array(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(values)


def test_means_are_over_clients_and_not_over_texts() -> None:
    a = {"small": array(1.0, 1.0), "large": array(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)}
    b = {"small": array(0.0, 1.0), "large": array(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)}

    got = compare(a, b)

    assert (got.mean_a, got.mean_b) == (0.5, 0.25)
    assert got.difference == 0.25
    assert got.n_texts == 8


def test_the_interval_by_hand() -> None:
    # Two texts with differences 0 and 1: a resample has mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    got = compare({"c": array(0.0, 1.0)}, {"c": array(0.0, 0.0)})

    assert got.ci95 == (0.0, 1.0)
    # Two-sided: twice the share of resamples at or below 0, about 2 * 1/4.
    assert got.p_value == pytest.approx(0.5, abs=0.05)


def test_equal_sides_differ_by_nothing() -> None:
    values = {"c": array(0.2, 0.9, 0.4)}

    got = compare(values, values)

    assert (got.difference, got.ci95, got.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_a_constant_gain_is_certain() -> None:
    a = {"c": np.linspace(0, 1, 10) + 0.125}
    b = {"c": np.linspace(0, 1, 10)}

    got = compare(a, b, n_resamples=1000)

    assert got.ci95 == pytest.approx((0.125, 0.125))
    assert got.p_value == 2 / 1000  # no resample says otherwise; it cannot say 0


def test_swapping_the_sides_turns_the_sign() -> None:
    rng = np.random.default_rng(0)
    a, b = {"c": rng.random(40), "d": rng.random(30)}, {"c": rng.random(40), "d": rng.random(30)}

    there, back = compare(a, b), compare(b, a)

    assert there.difference == pytest.approx(-back.difference)
    assert there.ci95 == pytest.approx((-back.ci95[1], -back.ci95[0]))
    assert there.p_value == pytest.approx(back.p_value)


def test_seeds_are_averaged_per_text_first() -> None:
    two_seeds = np.array([[1.0, 0.0, 0.5], [0.0, 0.0, 0.5]])

    got = compare({"c": two_seeds}, {"c": array(0.0, 0.0, 0.0)})

    same = compare({"c": array(0.5, 0.0, 0.5)}, {"c": array(0.0, 0.0, 0.0)})
    assert got == same
    assert got.n_texts == 3


def test_pairing_takes_out_what_texts_have_in_common() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(200)  # some texts are harder than others, for both sides alike
    a, b = {"c": hard + 0.05 + 0.01 * rng.normal(size=200)}, {"c": hard}

    low, high = compare(a, b).ci95

    assert 0.04 < low < 0.05 < high < 0.06  # unpaired, the interval would be about 0.11 wide


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"c": array(1.0)}, {"d": array(1.0)}, "clients"),
        ({"c": array(1.0)}, {}, "clients"),
        ({}, {}, "clients"),
        ({"c": array(1.0, 2.0)}, {"c": array(1.0)}, "2 texts on one side and 1 on the other"),
    ],
)
def test_sides_that_do_not_match_are_refused(a: dict, b: dict, expected: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match=expected):
        compare(a, b)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = refused = 0
    for _ in range(200):
        a = {c: rng.normal(0.3, 1.0, size=60) for c in "xyz"}
        b = {c: rng.normal(0.0, 1.0, size=60) for c in "xyz"}
        got = compare(a, b, n_resamples=400, seed=int(rng.integers(2**31)))
        covered += got.ci95[0] <= 0.3 <= got.ci95[1]
        null = compare(a, {c: v + 0.3 for c, v in b.items()}, n_resamples=400, seed=int(rng.integers(2**31)))
        refused += null.p_value < 0.05

    assert 0.89 <= covered / 200 <= 0.99
    assert refused / 200 <= 0.11


def test_the_p_value_is_near_the_normal_one() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=400)
    x += 2.0 * x.std() / 20 - x.mean()  # the mean is exactly two standard errors above zero

    got = compare({"c": x}, {"c": np.zeros(400)}, n_resamples=8000)

    assert got.p_value == pytest.approx(2 * norm.sf(2.0), abs=0.015)


def test_mean_interval_by_hand() -> None:
    mean, (low, high) = mean_interval({"a": array(0.0, 1.0), "b": array(1.0, 1.0)})

    assert mean == 0.75
    assert (low, high) == (0.5, 1.0)


def test_mean_interval_is_the_normal_one_for_many_texts() -> None:
    values = {"a": np.array([1.0] * 75 + [0.0] * 25)}

    mean, (low, high) = mean_interval(values)

    half = 1.96 * np.sqrt(0.75 * 0.25 / 100)
    assert mean == 0.75
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.011)


def test_holm_by_hand() -> None:
    # Sorted .01, .03, .04 times 3, 2, 1 gives .03, .06, .04; never falling: .03, .06, .06.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None, max_examples=30)
def test_holm_never_lowers_a_p_value_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)

    assert all(p <= q <= 1.0 for p, q in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
