"""The policy over slots: its gradients against exact expectations and numerical derivatives, its floor, its best."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax

from clients.policy import known_advantages
from promptfed.prompts.slots import draw, entropy, floored, most_probable, policy_gradient
from promptfed.types import FloatArray

LOGITS = np.array([[0.5, -0.2, 0.1], [-1.0, 0.3, 0.0]])
# Loss of every prompt of two slots over three n-grams; not a sum over slots.
LOSS = np.array([[0.9, 0.2, 0.5], [1.5, 0.1, 0.7], [0.3, 0.8, 2.0]])

extreme = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-3e38, 3e38))


def expected_loss(logits: FloatArray) -> float:
    p = softmax(logits, axis=1)
    return float(p[0] @ LOSS @ p[1])


def numerical(function: object, at: FloatArray, h: float = 1e-6) -> FloatArray:
    """Central differences of ``function`` of a matrix."""
    out = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[place] = h
        out[place] = (function(at + step) - function(at - step)) / (2 * h)  # type: ignore[operator]
    return out


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("n_samples", [2, 3])
def test_the_estimator_is_unbiased_with_the_leave_one_out_baseline(n_samples: int) -> None:
    """Over all 9^I outcomes of I draws, its mean is the gradient of the expected loss."""
    p = softmax(LOGITS, axis=1)
    prompts = list(product(range(3), range(3)))
    mean = np.zeros_like(LOGITS)
    for outcome in product(prompts, repeat=n_samples):
        chance = np.prod([p[0, a] * p[1, b] for a, b in outcome])
        losses = np.array([[LOSS[a, b]] for a, b in outcome])
        scores = np.stack([np.eye(3)[list(prompt)] - p for prompt in outcome])
        mean += chance * policy_gradient(known_advantages(losses, losses), scores)

    np.testing.assert_allclose(mean, numerical(expected_loss, LOGITS), atol=1e-8)


def test_the_score_is_the_derivative_of_the_log_probability() -> None:
    drawn, scores = draw(LOGITS, 4, np.random.default_rng(0))

    for prompt, score in zip(drawn, scores, strict=True):
        chosen = tuple(prompt)

        def log_p(logits: FloatArray, chosen: tuple[int, ...] = chosen) -> float:
            return float(sum(log_softmax(logits, axis=1)[i, j] for i, j in enumerate(chosen)))

        np.testing.assert_allclose(score, numerical(log_p, LOGITS), atol=1e-8)


def test_the_gumbel_score_is_the_derivative_of_the_noised_log_probability() -> None:
    """And a times the published (1 - p)/(a tau) for the drawn n-gram and -p/(a tau) for the others."""
    tau, n = 0.7, 5
    noise = np.random.default_rng(3).gumbel(size=(n, *LOGITS.shape))  # what `draw` draws first
    drawn, scores = draw(LOGITS, n, np.random.default_rng(3), tau)

    for g, prompt, score in zip(noise, drawn, scores, strict=True):

        def log_p(logits: FloatArray, g: FloatArray = g, prompt: FloatArray = prompt) -> float:
            p = log_softmax((logits + g) / tau, axis=1)
            return float(sum(p[i, j] for i, j in enumerate(prompt)))

        np.testing.assert_allclose(score, numerical(log_p, LOGITS), atol=1e-7)
        a, p = np.exp(LOGITS), softmax((LOGITS + g) / tau, axis=1)
        is_drawn = np.eye(3)[prompt] > 0
        np.testing.assert_allclose(score / a, np.where(is_drawn, (1 - p) / (a * tau), -p / (a * tau)), atol=1e-12)


def test_the_gumbel_estimator_follows_the_expected_loss_of_its_own_draws() -> None:
    """Without bias too: its mean over many draws against the numerical derivative under common noise."""
    tau, n, rng = 1.0, 200_000, np.random.default_rng(5)
    drawn, scores = draw(LOGITS, n, rng, tau)
    losses = LOSS[drawn[:, 0], drawn[:, 1]][:, None]
    g = np.random.default_rng(6).gumbel(size=(n, *LOGITS.shape))

    def expected(logits: FloatArray) -> float:
        p = softmax((logits + g) / tau, axis=2)
        return float(np.einsum("ni,ij,nj->n", p[:, 0], LOSS, p[:, 1]).mean())

    estimate = policy_gradient((losses - losses.mean())[:, 0] * n / (n - 1), scores)
    np.testing.assert_allclose(estimate, numerical(expected, LOGITS, 1e-4), atol=0.004)


def test_drawn_as_often_as_the_policy_says() -> None:
    drawn, _ = draw(LOGITS, 100_000, np.random.default_rng(1))

    often = np.stack([np.bincount(drawn[:, slot], minlength=3) for slot in range(2)]) / 100_000
    np.testing.assert_allclose(often, softmax(LOGITS, axis=1), atol=0.006)


# ---------------------------------------------------------------- nothing breaks


@given(logits=extreme, temperature=st.none() | st.floats(1e-3, 100.0), share=st.floats(0.0, 0.99))
@settings(deadline=None)
def test_extreme_logits_never_make_a_nan(logits: FloatArray, temperature: float | None, share: float) -> None:
    drawn, scores = draw(logits, 3, np.random.default_rng(0), temperature)
    kept = floored(logits, share)

    assert ((drawn >= 0) & (drawn < logits.shape[1])).all()
    assert np.isfinite(scores).all()
    assert np.isfinite(kept).all()
    np.testing.assert_allclose(np.exp(kept).sum(axis=1), 1.0, atol=1e-9)
    assert (entropy(np.exp(kept)) >= share * np.log(logits.shape[1]) - 1e-6).all()
    np.testing.assert_allclose(np.exp(floored(kept, share)), np.exp(kept), atol=1e-6)


@given(logits=extreme)
@settings(deadline=None)
def test_the_floor_keeps_the_order(logits: FloatArray) -> None:
    kept, rows = floored(logits, 0.5), np.arange(len(logits))

    best = softmax(logits, axis=1).argmax(axis=1)
    assert (kept[rows, best] >= kept.max(axis=1) - 1e-12).all()


def test_the_floor_leaves_a_policy_alone_that_is_above_it() -> None:
    np.testing.assert_allclose(floored(LOGITS, 0.2), log_softmax(LOGITS, axis=1), atol=1e-7)


def test_the_floor_of_a_sure_slot_by_hand() -> None:
    """Two n-grams, one of them sure: mixed so that the entropy is half of log 2, which .11 and .89 have."""
    kept = np.exp(floored(np.array([[100.0, 0.0]]), 0.5))

    assert kept[0, 1] == pytest.approx(0.11, abs=1e-3)
    assert entropy(kept)[0] == pytest.approx(0.5 * np.log(2))


def test_the_most_probable_prompts_by_hand() -> None:
    logits = np.log([[0.5, 0.4, 0.1], [0.1, 0.7, 0.2]])

    # .5 x .7; then .4 x .7 = .28 before .5 x .2 = .10
    assert most_probable(logits, 3).tolist() == [[0, 1], [1, 1], [0, 2]]
    assert most_probable(logits, 9).tolist() == [[0, 1], [1, 1], [0, 2]]
    assert most_probable(logits, 1).tolist() == [[0, 1]]
