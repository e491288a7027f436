"""Calibration and stacking: equations (1) and (2) of the module, checked by hand and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import check_grad, minimize
from scipy.special import log_softmax

from promptfed.prompts.calibration import (
    MIN_WEIGHT,
    PRIOR_SHARPNESS,
    Calibration,
    batch_calibration,
    centre,
    cross_fitted_proba,
    fit,
    log_prior,
    mix,
    moments,
    newton_step,
    prior,
    sums,
)
from promptfed.types import FloatArray, IntArray


def logprobs(n: int, n_sources: int, n_labels: int, seed: int = 0) -> tuple[FloatArray, IntArray]:
    """Noisy label scores that do favour the true label, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_labels, size=n)
    raw = rng.normal(size=(n, n_sources, n_labels)) + 1.2 * np.eye(n_labels)[labels][:, None]
    raw += np.array([1.0, *[0.0] * (n_labels - 1)])  # every source leans to label 0
    return np.asarray(log_softmax(raw, axis=2)), labels


def penalised(x: FloatArray, scores: FloatArray, labels: IntArray, start: Calibration, strength: float) -> float:
    """Equation (2), written out anew."""
    j = scores.shape[1]
    w0, b0 = np.array(start.weights), np.array(start.bias)
    logits = (scores - scores.mean(axis=2, keepdims=True)).transpose(0, 2, 1) @ x[:j] + x[j:]
    loss = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels].sum()
    return float(loss + strength / 2 * ((x[j:] - b0) ** 2).sum() + strength / 2 * (((x[:j] - w0) / w0) ** 2).sum())


# ---------------------------------------------------------------- equation (1)


def test_centring_takes_the_mean_over_labels_from_each_source() -> None:
    scores = np.array([[[-1.0, -3.0], [0.0, -5.0]]])

    assert centre(scores).tolist() == [[[1.0, -1.0], [2.5, -2.5]]]


def test_logits_are_the_weighted_sum_of_centred_scores_plus_the_bias() -> None:
    scores = np.array([[[-1.0, -3.0], [0.0, -5.0]]])
    calibration = Calibration(weights=(2.0, 0.4), bias=(0.5, -0.5))

    # label 0: 2 * 1 + 0.4 * 2.5 + 0.5 = 3.5; label 1: -2 - 1 - 0.5 = -3.5
    assert calibration.logits(scores)[0].tolist() == pytest.approx([3.5, -3.5])
    assert calibration.predict_proba(scores)[0, 0] == pytest.approx(1 / (1 + math.exp(-7.0)))


@given(
    scores=arrays(np.float64, (5, 2, 3), elements=st.floats(-20, 0)),
    shift=arrays(np.float64, (5, 2, 1), elements=st.floats(-5, 5)),
)
@settings(deadline=None, max_examples=30)
def test_a_constant_added_to_all_labels_of_a_source_changes_nothing(scores: FloatArray, shift: FloatArray) -> None:
    calibration = Calibration(weights=(1.5, 0.3), bias=(0.1, 0.0, -0.2))

    assert calibration.logits(scores + shift) == pytest.approx(calibration.logits(scores), abs=1e-9)
    assert calibration.predict_proba(scores).sum(axis=1) == pytest.approx(np.ones(5))


# ---------------------------------------------------------------- the prior


def test_prior_by_hand() -> None:
    # Two texts, one source, two labels; centred scores are (+2, -2) and (0, 0).
    scores = np.array([[[-1.0, -5.0]], [[-3.0, -3.0]]])

    got = batch_calibration(scores)

    # The mean is (1, -1), the mean square (2, 2), so the variance is 2 - 1 = 1 and the weight 1.5 / 1.
    assert got.weights == pytest.approx((PRIOR_SHARPNESS,))
    assert got.bias == pytest.approx((-PRIOR_SHARPNESS, PRIOR_SHARPNESS))
    # The bias takes the lean off: over these texts the logits average to zero.
    assert got.logits(scores).mean(axis=0) == pytest.approx([0.0, 0.0])


def test_prior_weighs_standardised_sources_alike() -> None:
    scores, _ = logprobs(50, 1, 3)
    both = np.concatenate([scores, 10.0 * scores], axis=1)  # the same news, told ten times as loudly

    weights = batch_calibration(both).weights

    assert weights[0] == pytest.approx(10.0 * weights[1])
    # Two equal sources at half weight say what one says at full weight.
    assert batch_calibration(both).logits(both) == pytest.approx(batch_calibration(scores).logits(scores))


def test_moments_add_up_over_clients() -> None:
    scores, _ = logprobs(30, 2, 3)

    total, squares = moments(scores)
    parts = [moments(scores[:10]), moments(scores[10:])]

    assert total == pytest.approx(parts[0][0] + parts[1][0])
    assert squares == pytest.approx(parts[0][1] + parts[1][1])
    assert prior(30, total, squares).weights == pytest.approx(batch_calibration(scores).weights)


def test_prior_of_no_text_is_neutral() -> None:
    got = batch_calibration(np.zeros((0, 2, 3)))

    assert got.weights == (PRIOR_SHARPNESS / 2,) * 2
    assert got.bias == (0.0,) * 3


def test_a_source_that_always_says_the_same_gives_finite_probabilities() -> None:
    scores = np.full((6, 1, 2), -math.log(2))

    assert batch_calibration(scores).predict_proba(scores) == pytest.approx(np.full((6, 2), 0.5))


def test_log_prior_by_hand() -> None:
    # Two of label 0 and one of label 1, each counted once more: 3/5 and 2/5, centred.
    got = log_prior(np.array([0, 1, 0]), 2)

    assert got == pytest.approx([0.5 * math.log(1.5), -0.5 * math.log(1.5)])
    assert log_prior(np.array([0, 1, 1, 0]), 2) == pytest.approx([0.0, 0.0])
    assert log_prior(np.zeros(0, dtype=np.int64), 3) == pytest.approx([0.0] * 3)
    # A label that never occurs stays possible: 5/7, 1/7, 1/7.
    absent = log_prior(np.zeros(4, dtype=np.int64), 3)
    assert absent[0] - absent[1] == pytest.approx(math.log(5.0))
    assert absent.sum() == pytest.approx(0.0)


def test_shifting_by_the_log_prior_multiplies_the_odds() -> None:
    scores, _ = logprobs(6, 2, 2)
    balanced = batch_calibration(scores)

    shifted = balanced.shifted(np.array([math.log(3.0), 0.0]))

    assert shifted.weights == balanced.weights
    before, after = balanced.predict_proba(scores), shifted.predict_proba(scores)
    assert after[:, 0] / after[:, 1] == pytest.approx(3.0 * before[:, 0] / before[:, 1])


# ---------------------------------------------------------------- Newton sums


@pytest.mark.parametrize(("n_sources", "n_labels"), [(1, 2), (3, 2), (2, 4)])
def test_gradient_and_hessian_agree_with_finite_differences(n_sources: int, n_labels: int) -> None:
    scores, labels = logprobs(20, n_sources, n_labels)
    rng = np.random.default_rng(1)
    x = rng.normal(size=n_sources + n_labels)

    def at(x: FloatArray) -> Calibration:
        return Calibration(weights=tuple(x[:n_sources]), bias=tuple(x[n_sources:]))

    def loss(x: FloatArray) -> float:
        return sums(scores, labels, at(x)).loss

    def gradient(x: FloatArray) -> FloatArray:
        return sums(scores, labels, at(x)).gradient

    assert check_grad(loss, gradient, x) < 1e-4
    numeric = np.array([(gradient(x + e) - gradient(x - e)) / 2e-5 for e in 1e-5 * np.eye(len(x))])
    assert sums(scores, labels, at(x)).hessian == pytest.approx(numeric, abs=1e-4)


def test_loss_by_hand() -> None:
    # Logits (1, -1) and (0, 0) for labels 0 and 1.
    scores = np.array([[[0.0, -2.0]], [[-3.0, -3.0]]])

    got = sums(scores, np.array([0, 1]), Calibration(weights=(1.0,), bias=(0.0, 0.0)))

    assert got.n == 2
    assert got.loss == pytest.approx(math.log(1 + math.exp(-2.0)) + math.log(2.0))
    # d loss / d bias = sum of (probability - truth): text 1 gives p1(1) and text 2 gives 1/2 - 1.
    wrong = 1 / (1 + math.exp(2.0))
    assert got.gradient[1:] == pytest.approx([-wrong + 0.5, wrong - 0.5])


def test_sums_add_up_over_clients_and_an_empty_client_adds_nothing() -> None:
    scores, labels = logprobs(30, 2, 3)
    at = batch_calibration(scores)

    whole = sums(scores, labels, at)
    parts = sums(scores[:12], labels[:12], at) + sums(scores[12:], labels[12:], at) + sums(scores[:0], labels[:0], at)

    assert parts.n == whole.n == 30
    assert parts.loss == pytest.approx(whole.loss)
    assert parts.gradient == pytest.approx(whole.gradient)
    assert parts.hessian == pytest.approx(whole.hessian)


def test_federated_newton_steps_equal_the_pooled_fit() -> None:
    scores, labels = logprobs(60, 2, 3)
    start = at = batch_calibration(scores)

    for _ in range(5):
        pooled = sums(scores[:20], labels[:20], at) + sums(scores[20:], labels[20:], at)
        at = newton_step(pooled, at, start, 4.0)

    central = fit(scores, labels, strength=4.0, steps=5)
    assert at.weights == pytest.approx(central.weights)
    assert at.bias == pytest.approx(central.bias)


# ---------------------------------------------------------------- equation (2)


@pytest.mark.parametrize(("n", "n_sources", "n_labels"), [(40, 1, 2), (60, 3, 2), (80, 2, 4)])
@pytest.mark.parametrize("strength", [1.0, 4.0, 30.0])
def test_fit_finds_the_minimum_that_scipy_finds(n: int, n_sources: int, n_labels: int, strength: float) -> None:
    scores, labels = logprobs(n, n_sources, n_labels)
    start = batch_calibration(scores)
    x0 = np.array(start.weights + start.bias)

    got = fit(scores, labels, strength=strength)
    best = minimize(
        penalised,
        x0,
        args=(scores, labels, start, strength),
        bounds=[(MIN_WEIGHT, None)] * n_sources + [(None, None)] * n_labels,
        method="L-BFGS-B",
        options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 2000},
    )

    reached = penalised(np.array(got.weights + got.bias), scores, labels, start, strength)
    assert reached == pytest.approx(best.fun, abs=1e-3)
    assert reached <= penalised(x0, scores, labels, start, strength)


def test_more_strength_stays_nearer_to_the_prior() -> None:
    scores, labels = logprobs(40, 2, 2)
    start = batch_calibration(scores)

    def distance(strength: float) -> float:
        got = fit(scores, labels, strength=strength)
        return float(np.abs(np.subtract(got.bias, start.bias)).max())

    assert distance(1000.0) < distance(10.0) < distance(0.5)
    assert distance(1e8) < 1e-5


def test_without_labels_the_fit_is_the_prior() -> None:
    towards = Calibration(weights=(0.7, 0.2), bias=(0.1, -0.1))

    got = fit(np.zeros((0, 2, 2)), np.zeros(0, dtype=np.int64), towards=towards)

    assert got == towards


def test_the_fit_takes_up_a_label_prior_that_scores_do_not_show() -> None:
    scores = np.full((40, 1, 2), -math.log(2))
    labels = np.array([0] * 36 + [1] * 4)

    proba = fit(scores, labels, strength=0.1).predict_proba(scores)

    assert proba[0, 0] == pytest.approx(0.9, abs=0.01)


def test_a_source_worse_than_chance_is_dropped_and_not_inverted() -> None:
    good, labels = logprobs(200, 1, 2)
    bad = np.asarray(log_softmax(2.0 * np.eye(2)[1 - labels] + good[::-1, 0], axis=1))[:, None]
    both = np.concatenate([good, bad], axis=1)
    assert (bad[:, 0].argmax(axis=1) == labels).mean() < 0.5

    got = fit(both, labels, strength=0.01, steps=20)

    assert got.weights[1] == MIN_WEIGHT
    assert got.weights[0] > 0
    assert (got.predict_proba(both).argmax(axis=1) == labels).mean() > 0.7


# ---------------------------------------------------------------- cross-fitting and means


def test_cross_fitting_never_sees_the_label_of_its_own_text() -> None:
    scores, labels = logprobs(23, 2, 2)
    before = cross_fitted_proba(scores, labels)
    flipped = labels.copy()
    flipped[7] = 1 - flipped[7]

    after = cross_fitted_proba(scores, flipped)

    same_fold = np.arange(23) % 5 == 7 % 5
    assert after[same_fold] == pytest.approx(before[same_fold])
    assert np.abs(after[~same_fold] - before[~same_fold]).max() > 1e-4


def test_cross_fitting_equals_a_fit_on_the_other_folds() -> None:
    scores, labels = logprobs(20, 1, 3)
    held = np.arange(20) % 5 == 2

    rest = fit(scores[~held], labels[~held], towards=batch_calibration(scores))

    assert cross_fitted_proba(scores, labels)[held] == pytest.approx(rest.predict_proba(scores[held]))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_cross_fitting_few_texts_gives_probabilities(n: int) -> None:
    scores, labels = logprobs(n, 2, 3)

    proba = cross_fitted_proba(scores, labels)

    assert proba.shape == (n, 3)
    assert np.isfinite(proba).all()
    assert proba.sum(axis=1) == pytest.approx(np.ones(n))


def test_one_text_without_other_labels_gets_the_prior() -> None:
    scores, labels = logprobs(1, 1, 2)

    # A single text is its own mean: the label-free prior can only say "even".
    assert cross_fitted_proba(scores, labels) == pytest.approx(np.array([[0.5, 0.5]]))


def test_mix_by_hand() -> None:
    parts = [(1.0, np.array([0.0, 2.0])), (3.0, np.array([4.0, -2.0]))]

    # Half the say for each of two prompts: halved weights, averaged biases.
    assert mix(parts) == Calibration(weights=(0.5, 1.5), bias=(2.0, 0.0))


def test_mixing_single_prompt_priors_gives_the_prior_of_the_set() -> None:
    scores, _ = logprobs(40, 3, 2)
    alone = [batch_calibration(scores[:, [j]]) for j in range(3)]

    mixed = mix([(c.weights[0], np.array(c.bias)) for c in alone])

    together = batch_calibration(scores)
    assert mixed.weights == pytest.approx(together.weights)
    assert mixed.bias == pytest.approx(together.bias)
