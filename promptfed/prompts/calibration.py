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
from scipy.special import log_softmax, softmax

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
    """Sums over texts that the prior needs: of centred scores (J, K) and of their squares (J, K)."""
    c = centre(scores)
    return c.sum(axis=0), (c**2).sum(axis=0)


def prior(n: int, total: FloatArray, squares: FloatArray) -> Calibration:
    """Batch calibration: standardise each source, weigh all alike. ``total``, ``squares``: (J, K) from `moments`.

    Without labels (K = 0) there is nothing to standardise: each of J prompts has a vote of 1/J.
    """
    n_sources, n_labels = total.shape
    if not n_labels:
        return Calibration(weights=(1.0 / n_sources,) * n_sources, bias=())
    if n == 0:
        return Calibration(weights=(PRIOR_SHARPNESS / n_sources,) * n_sources, bias=(0.0,) * n_labels)
    mean = total / n
    sd = np.sqrt(np.maximum((squares / n - mean**2).mean(axis=1), 1e-6))
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


def batch_calibration(scores: FloatArray) -> Calibration:
    """The label-free prior from the scores themselves, shape (n, J, K)."""
    return prior(len(scores), *moments(scores))


def sums(scores: FloatArray, labels: IntArray, at: Calibration) -> NewtonSums:
    """What one client adds to a Newton step at ``at``. ``scores`` (n, J, K), ``labels`` (n,)."""
    c = centre(scores)
    n, _, n_labels = c.shape
    logp = log_softmax(at.logits(scores), axis=1)
    p = np.exp(logp)
    onehot = np.eye(n_labels)[labels]
    # The design of text i is D_i = [c_i^T | I], shape (K, J+K), so that logits_i = D_i @ (weights, bias).
    design = np.concatenate([c.transpose(0, 2, 1), np.broadcast_to(np.eye(n_labels), (n, n_labels, n_labels))], axis=2)
    gradient = np.einsum("nk,nkd->d", p - onehot, design)
    mean = np.einsum("nk,nkd->nd", p, design)
    hessian = np.einsum("nk,nkd,nke->de", p, design, design, optimize=True) - mean.T @ mean
    return NewtonSums(n=n, loss=float(-logp[np.arange(n), labels].sum()), gradient=gradient, hessian=hessian)


def newton_step(total: NewtonSums, at: Calibration, towards: Calibration, strength: float) -> Calibration:
    """One penalised Newton step of (2) from ``at``, with ``towards`` as the prior and ``strength`` as s."""
    j = len(at.weights)
    x = np.array(at.weights + at.bias)
    x0 = np.array(towards.weights + towards.bias)
    scale = np.ones_like(x)
    scale[:j] = 1.0 / np.maximum(np.abs(x0[:j]), 1e-9) ** 2
    gradient = total.gradient + strength * scale * (x - x0)
    hessian = total.hessian + strength * np.diag(scale)
    x = x - np.linalg.solve(hessian, gradient)
    x[:j] = np.maximum(x[:j], MIN_WEIGHT)
    return Calibration(weights=tuple(x[:j].tolist()), bias=tuple(x[j:].tolist()))


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
    at = start
    for _ in range(steps if len(labels) else 0):
        at = newton_step(sums(scores, labels, at), at, start, strength)
    return at


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
    out = np.empty((len(scores), scores.shape[2]))
    fold = np.arange(len(scores)) % min(folds, max(len(scores), 1))
    for f in np.unique(fold):
        held = fold == f
        rest = fit(scores[~held], labels[~held], towards=start, strength=strength)
        out[held] = rest.predict_proba(scores[held])
    return out
