"""Calibration and stacking of label scores: one small convex model for all of it.

The scores of J sources (prompts of a set, or a domain model) for one text are J vectors of log-probabilities over K
labels. They are combined as

    logits_k = sum_j weights_j * centred_jk + bias_k,    centred_jk = logp_jk - mean_k logp_jk         (1)

and fitted by penalised maximum likelihood,

    sum_i -log softmax(logits_i)[y_i] + s/2 * |bias - bias0|^2 + s/2 * sum_j ((weights_j - w0_j)/w0_j)^2  (2)

so that with few texts the fit stays at its prior (bias0, w0). With J = 1 this is Platt/vector scaling with one
temperature (Guo et al., ICML 2017, arXiv 1706.04599, section 4.2); the prior is batch calibration (Zhou et al., ICLR
2024, arXiv 2309.17249, eq. 3), which needs no labels. Since (2) is a sum over texts, clients can fit it together by
sending sums of gradients and Hessians (`sums`), never a text or its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from promptfed.types import FloatArray, IntArray

# Standardised scores are multiplied by this before the softmax: a prior temperature under which a
# typical two-label score (1 sd from the boundary) is 0.82 sure. The fit moves it where labels say so.
PRIOR_SHARPNESS = 1.5
# s in equation (2) for a client's own fits: with 25 to 50 texts a client, 4 to 16 do alike on sentiment5's train split.
STRENGTH = 8.0
# Weights of one source may not turn negative: a source that is worse than chance is dropped, not inverted.
MIN_WEIGHT = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Weights (J,) of the sources and bias (K,) of the labels in equation (1)."""

    weights: tuple[float, ...]
    bias: tuple[float, ...]

    def logits(self, scores: FloatArray) -> FloatArray:
        """Combined logits, shape (n, K), of ``scores`` (n, J, K)."""
        combined = np.einsum("j,njk->nk", np.asarray(self.weights), centre(scores))
        return np.asarray(combined + np.asarray(self.bias))

    def shifted(self, offset: FloatArray) -> Calibration:
        """With ``offset`` (K,) added to the bias."""
        return Calibration(weights=self.weights, bias=tuple((np.asarray(self.bias) + offset).tolist()))

    def predict_proba(self, scores: FloatArray) -> FloatArray:
        """Label probabilities, shape (n, K)."""
        return np.asarray(softmax(self.logits(scores), axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewtonSums:
    """Sums over texts of the negative log-likelihood's value, gradient (J+K,) and Hessian (J+K, J+K)."""

    n: int
    loss: float
    gradient: FloatArray
    hessian: FloatArray

    def __add__(self, other: NewtonSums) -> NewtonSums:
        return NewtonSums(
            n=self.n + other.n,
            loss=self.loss + other.loss,
            gradient=self.gradient + other.gradient,
            hessian=self.hessian + other.hessian,
        )


def centre(scores: FloatArray) -> FloatArray:
    """Subtract each source's mean over labels. Shape (n, J, K) in and out; nothing to do without labels."""
    if not scores.shape[2]:
        return scores
    return np.asarray(scores - scores.mean(axis=2, keepdims=True))


def moments(scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Sums over texts that the prior needs: of centred scores (J, K), and of their squares over labels too (J,)."""
    c = centre(scores)
    return c.sum(axis=0), (c**2).sum(axis=(0, 2))


def prior(n: int, total: FloatArray, squares: FloatArray) -> Calibration:
    """Batch calibration: standardise each source, weigh all alike. ``total`` (J, K), ``squares`` (J,): `moments`.

    Without labels (K = 0) there is nothing to standardise: each of J prompts has a vote of 1/J.
    """
    n_sources, n_labels = total.shape
    if not n_labels:
        return Calibration(weights=(1.0 / n_sources,) * n_sources, bias=())
    if n == 0:
        return Calibration(weights=(PRIOR_SHARPNESS / n_sources,) * n_sources, bias=(0.0,) * n_labels)
    mean = total / n
    sd = np.sqrt(np.maximum(squares / (n * n_labels) - (mean**2).mean(axis=1), 1e-6))
    weights = PRIOR_SHARPNESS / (sd * len(sd))
    return Calibration(weights=tuple(weights.tolist()), bias=tuple((-(weights @ mean)).tolist()))


def log_prior(labels: IntArray, n_labels: int) -> FloatArray:
    """Centred log of a client's label proportions (K,), each label counted once more than it occurs.

    Under label shift a client's best bias is the bias for balanced labels plus this (Saerens et al., Neural Computation
    2002, eq. 2.4). Clients add it on their side, so pooled biases are for balanced labels and proportions stay at home.
    """
    if not n_labels:
        return np.zeros(0)
    counts = np.bincount(labels, minlength=n_labels) + 1.0
    logs = np.log(counts / counts.sum())
    return np.asarray(logs - logs.mean())


def mix(parts: Sequence[tuple[float, FloatArray]]) -> Calibration:
    """Calibrations (weight, bias (K,)) of single prompts as one of their set, all with the same say."""
    n = len(parts)
    bias = np.mean([b for _, b in parts], axis=0)
    return Calibration(weights=tuple(w / n for w, _ in parts), bias=tuple(bias.tolist()))


def flattened(each: Sequence[Calibration]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weights (J,) and flat bias (J x K) of calibrations of single prompts, as messages carry them."""
    return tuple(c.weights[0] for c in each), tuple(b for c in each for b in c.bias)


def batch_calibration(scores: FloatArray) -> Calibration:
    """The label-free prior from the scores themselves, shape (n, J, K)."""
    return prior(len(scores), *moments(scores))


def design(scores: FloatArray) -> FloatArray:
    """D (n, K, J+K) of ``scores`` (n, J, K): D_i = [c_i^T | I], so that logits_i = D_i @ (weights, bias)."""
    n, _, n_labels = scores.shape
    identity = np.broadcast_to(np.eye(n_labels), (n, n_labels, n_labels))
    return np.concatenate([centre(scores).transpose(0, 2, 1), identity], axis=2)


def sums(scores: FloatArray, labels: IntArray, at: Calibration) -> NewtonSums:
    """What one client adds to a Newton step at ``at``. ``scores`` (n, J, K), ``labels`` (n,)."""
    x = np.array([at.weights + at.bias])
    everything = np.ones((1, len(labels)))
    loss, gradient, hessian = _derivatives(design(scores), np.eye(scores.shape[2])[labels], everything, x)
    return NewtonSums(n=len(labels), loss=float(loss[0]), gradient=gradient[0], hessian=hessian[0])


def _derivatives(
    d: FloatArray, onehot: FloatArray, mask: FloatArray, x: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Loss (F,), gradient (F, J+K) and Hessian (F, J+K, J+K) of the negative log-likelihood of (2), summed over texts,
    for F fits at once: fit f is at ``x[f]`` and sees the texts of which ``mask[f]`` (n,) is 1."""
    n, n_labels, size = d.shape
    flat = d.reshape(n * n_labels, size)
    logits = (x @ flat.T).reshape(len(x), n, n_labels)
    logits = logits - logits.max(axis=2, keepdims=True)
    total = np.exp(logits).sum(axis=2, keepdims=True)
    loss = (((np.log(total) - logits) * onehot).sum(axis=2) * mask).sum(axis=1)
    p = np.exp(logits) / total * mask[:, :, None]
    gradient = (p - onehot * mask[:, :, None]).reshape(len(x), -1) @ flat
    weighted = p.reshape(len(x), -1, 1) * flat
    mean = weighted.reshape(len(x), n, n_labels, size).sum(axis=2)
    return loss, gradient, weighted.swapaxes(1, 2) @ flat - mean.swapaxes(1, 2) @ mean


def newton_step(total: NewtonSums, at: Calibration, towards: Calibration, strength: float) -> Calibration:
    """One penalised Newton step of (2) from ``at``, with ``towards`` as the prior and ``strength`` as s."""
    x, x0 = (np.array([c.weights + c.bias]) for c in (at, towards))
    x = _step(total.gradient[None], total.hessian[None], x, x0[0], len(at.weights), strength)
    return _calibration(x[0], len(at.weights))


def _step(
    gradient: FloatArray, hessian: FloatArray, x: FloatArray, x0: FloatArray, n_sources: int, strength: float
) -> FloatArray:
    """A penalised Newton step of F fits at once, shapes as in `_derivatives`; all are held to ``x0`` (J+K,)."""
    scale = np.ones_like(x0)
    scale[:n_sources] = 1.0 / np.maximum(np.abs(x0[:n_sources]), 1e-9) ** 2
    gradient = gradient + strength * scale * (x - x0)
    x = x - np.linalg.solve(hessian + strength * np.diag(scale), gradient[:, :, None])[:, :, 0]
    x[:, :n_sources] = np.maximum(x[:, :n_sources], MIN_WEIGHT)
    return np.asarray(x)


def _calibration(x: FloatArray, n_sources: int) -> Calibration:
    return Calibration(weights=tuple(x[:n_sources].tolist()), bias=tuple(x[n_sources:].tolist()))


def fit(
    scores: FloatArray,
    labels: IntArray,
    *,
    towards: Calibration | None = None,
    strength: float = STRENGTH,
    steps: int = 5,
) -> Calibration:
    """Fit (2) on ``scores`` (n, J, K) and ``labels`` (n,). ``strength`` is s: larger stays nearer to the prior.

    ``towards`` defaults to `batch_calibration` of the same scores, which reads no label.
    """
    start = batch_calibration(scores) if towards is None else towards
    everything = np.ones((1, len(labels)))
    return _calibration(_fits(design(scores), labels, everything, start, strength, steps)[0], len(start.weights))


def _fits(
    d: FloatArray, labels: IntArray, mask: FloatArray, start: Calibration, strength: float, steps: int = 5
) -> FloatArray:
    """F fits of (2) at once, (F, J+K): fit f sees the texts of which ``mask[f]`` is 1."""
    x0 = np.array(start.weights + start.bias)
    x, onehot = np.tile(x0, (len(mask), 1)), np.eye(d.shape[1])[labels]
    for _ in range(steps if len(labels) else 0):
        _, gradient, hessian = _derivatives(d, onehot, mask, x)
        x = _step(gradient, hessian, x, x0, len(start.weights), strength)
    return x


def cross_fitted_proba(
    scores: FloatArray,
    labels: IntArray,
    *,
    towards: Calibration | None = None,
    strength: float = STRENGTH,
    folds: int = 5,
) -> FloatArray:
    """Calibrated probabilities (n, K) of texts by fits that did not see their labels.

    Fold of text i is i mod ``folds``: the caller shuffles. The label-free prior sees all texts.
    """
    start = batch_calibration(scores) if towards is None else towards
    n_folds = min(folds, max(len(scores), 1))
    fold, d = np.arange(len(scores)) % n_folds, design(scores)
    x = _fits(d, labels, (fold != np.arange(n_folds)[:, None]).astype(np.float64), start, strength)
    return np.asarray(softmax((d @ x[fold][:, :, None])[:, :, 0], axis=1))
