"""Metrics against scikit-learn, and by hand where it has none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, log_loss

from evaluators.metrics import METRICS, PRIMARY, accuracy, brier, ece, macro_f1, nll, with_errors
from promptfed.types import FloatArray, IntArray


def some(n: int, n_labels: int, seed: int) -> tuple[FloatArray, IntArray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(n_labels), size=n), rng.integers(n_labels, size=n)


cases = pytest.mark.parametrize(("n", "n_labels", "seed"), [(1, 2, 0), (7, 2, 1), (50, 2, 2), (60, 4, 3), (3, 5, 4)])


@cases
def test_accuracy_is_scikit_learns(n: int, n_labels: int, seed: int) -> None:
    proba, labels = some(n, n_labels, seed)

    assert accuracy(proba, labels) == pytest.approx(accuracy_score(labels, proba.argmax(axis=1)))


@cases
def test_macro_f1_is_scikit_learns(n: int, n_labels: int, seed: int) -> None:
    proba, labels = some(n, n_labels, seed)

    assert macro_f1(proba, labels) == pytest.approx(f1_score(labels, proba.argmax(axis=1), average="macro"))


@cases
def test_nll_is_scikit_learns_log_loss(n: int, n_labels: int, seed: int) -> None:
    proba, labels = some(n, n_labels, seed)

    assert nll(proba, labels) == pytest.approx(log_loss(labels, proba, labels=range(n_labels)))


@pytest.mark.parametrize("seed", range(3))
def test_brier_of_two_labels_is_twice_scikit_learns(seed: int) -> None:
    proba, labels = some(40, 2, seed)

    # Brier (1950) sums over both labels, whose squared distances are equal; scikit-learn takes one of them.
    assert brier(proba, labels) == pytest.approx(2 * brier_score_loss(labels, proba[:, 1]))


def test_brier_by_hand() -> None:
    proba = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.25, 0.25]])

    # 0, 2 and 0.25 + 0.0625 + 0.0625
    assert brier(proba, np.array([0, 1, 0])) == pytest.approx((0 + 2 + 0.375) / 3)


def test_nll_by_hand_and_clipped() -> None:
    assert nll(np.array([[0.25, 0.75]]), np.array([0])) == pytest.approx(np.log(4))
    assert nll(np.array([[0.0, 1.0]]), np.array([0])) == pytest.approx(12 * np.log(10))


def test_macro_f1_counts_labels_that_occur_or_are_predicted() -> None:
    proba = np.eye(4)[[0, 0, 2]]

    # label 0: 1 hit, 2 guesses, 1 there: 2/3; label 1: there and never guessed: 0; label 2: 1; label 3 counts nowhere.
    got = macro_f1(np.eye(4)[[0, 0, 2]], np.array([0, 1, 2]))

    assert got == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert macro_f1(proba, np.array([0, 0, 2])) == 1.0


def test_ece_by_hand() -> None:
    # Confidences .95 right, .95 wrong (bin 15), .70 right (bin 11): gaps |1.90 - 1| and |.70 - 1| over 3 texts.
    proba = np.array([[0.95, 0.05], [0.05, 0.95], [0.7, 0.3]])

    assert ece(proba, np.array([0, 0, 0])) == pytest.approx((0.9 + 0.3) / 3)


def test_ece_lets_errors_in_one_bin_cancel() -> None:
    # Four texts that are 0.75 sure, three of them right.
    assert ece(np.tile([0.75, 0.25], (4, 1)), np.array([0, 0, 0, 1])) == pytest.approx(0.0)


def test_ece_bins_are_closed_above() -> None:
    # 1/3 and 0.4 + 0.01 lie in the bins (4/15, 5/15] and (6/15, 7/15]: apart, so their gaps do not cancel.
    proba = np.array([[1 / 3, 1 / 3, 1 / 3], [0.41, 0.3, 0.29]])

    assert ece(proba, np.array([0, 1])) == pytest.approx((2 / 3 + 0.41) / 2)
    assert ece(np.array([[1.0, 0.0]]), np.array([0])) == 0.0
    assert ece(np.array([[1.0, 0.0]]), np.array([1])) == 1.0


@given(n=st.integers(1, 30), n_labels=st.integers(2, 5), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_every_metric_is_in_its_range_and_knows_the_perfect_prediction(n: int, n_labels: int, seed: int) -> None:
    proba, labels = some(n, n_labels, seed)
    perfect = np.eye(n_labels)[labels]
    upper = {"accuracy": 1.0, "macro_f1": 1.0, "ece": 1.0, "brier": 2.0, "nll": np.inf}

    for name, metric in METRICS.items():
        assert 0.0 <= metric(proba, labels) <= upper[name]
        assert metric(perfect, labels) == pytest.approx(1.0 if name in ("accuracy", "macro_f1") else 0.0)


def test_bootstrap_error_of_accuracy_is_the_binomial_one() -> None:
    # 75 of 100 right: sqrt(.75 * .25 / 100) = 0.0433
    proba = np.tile([0.6, 0.4], (100, 1))
    labels = np.array([0] * 75 + [1] * 25)

    values, errors = with_errors(proba, labels, np.random.default_rng(0), n_resamples=2000)

    assert values["accuracy"] == 0.75
    assert errors["accuracy"] == pytest.approx(0.0433, rel=0.08)
    assert set(values) == set(errors) == set(METRICS)
    assert PRIMARY in METRICS


def test_errors_of_a_single_text_are_zero() -> None:
    _, errors = with_errors(np.array([[0.6, 0.4]]), np.array([0]), np.random.default_rng(0), n_resamples=20)

    assert all(e == pytest.approx(0.0) for e in errors.values())


def test_errors_are_repeatable() -> None:
    proba, labels = some(20, 3, 0)

    first = with_errors(proba, labels, np.random.default_rng(5), n_resamples=20)

    assert first == with_errors(proba, labels, np.random.default_rng(5), n_resamples=20)
