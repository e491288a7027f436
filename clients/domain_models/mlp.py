"""``mlp``: frozen vectors of an encoder under an adapter with one hidden layer.

Beside the linear head it can learn that two things matter only together. It has the linear head's way around it, a
residual connection, and starts as nothing beside it, so that little data leaves it close to a linear model (as the
adapters of Houlsby et al., ICML 2019, arXiv 1902.00751, start as the identity).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from promptfed.types import Encoder, FloatArray

N_HIDDEN = 32
# Strength of the L2 penalty on all weights, relative to one text.
PENALTY = 0.1


class MLPDomainModel:
    """softmax(W x + b + V tanh(U x + c)): U (H, d), c (H), V (K, H), W (K, d), b (K), flat in this order.

    U and c are drawn from ``seed``, the same at all clients, so that hidden units mean the same everywhere and averages
    make sense; V starts at zero.
    """

    def __init__(self, encoder: Encoder, n_labels: int, *, seed: int = 0, n_hidden: int = N_HIDDEN) -> None:
        self._encoder, self._n_labels, self._n_hidden = encoder, n_labels, n_hidden
        self._dimension = encoder.encode([]).shape[1]
        self._start = self._first(seed)
        self.parameters = self._start

    def fit(self, texts: Sequence[str], targets: FloatArray) -> MLPDomainModel:
        self.parameters = self._start
        self.parameters = self.trained(texts, targets, n_steps=300)
        return self

    def trained(self, texts: Sequence[str], targets: FloatArray, *, n_steps: int, proximal: float = 0.0) -> FloatArray:
        """As `clients.domain_models.base.Averageable` says; a step is an iteration of L-BFGS."""
        x, start = self._encoder.encode(texts), self.parameters

        def objective(flat: FloatArray) -> tuple[float, FloatArray]:
            u, c, v, w, b = self._parts(flat)
            hidden = np.tanh(x @ u.T + c)
            logp = log_softmax(x @ w.T + b + hidden @ v.T, axis=1)
            error = np.exp(logp) * targets.sum(axis=1, keepdims=True) - targets
            inner = (error @ v) * (1 - hidden**2)
            # U is held to where it started and not to zero, where the hidden units would all be the same.
            moved = u - self._parts(self._start)[0]
            value = -(targets * logp).sum() + PENALTY / 2 * ((moved**2).sum() + (v**2).sum() + (w**2).sum())
            value += proximal * len(x) / 2 * ((flat - start) ** 2).sum()
            parts = [
                inner.T @ x + PENALTY * moved,
                inner.sum(axis=0),
                error.T @ hidden + PENALTY * v,
                error.T @ x + PENALTY * w,
                error.sum(axis=0),
            ]
            gradient = np.concatenate([part.ravel() for part in parts]) + proximal * len(x) * (flat - start)
            return value, gradient

        found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": n_steps}).x
        return np.asarray(found)

    def predict_proba(self, texts: Sequence[str]) -> FloatArray:
        u, c, v, w, b = self._parts(self.parameters)
        x = self._encoder.encode(texts)
        return np.asarray(softmax(x @ w.T + b + np.tanh(x @ u.T + c) @ v.T, axis=1))

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        h, d, k = self._n_hidden, self._dimension, self._n_labels
        return (h, d), (h,), (k, h), (k, d), (k,)

    def _first(self, seed: int) -> FloatArray:
        # Vectors of length 1 give hidden units with inputs of about 1. With c at zero they would all be odd functions,
        # and V could not leave zero where labels are even ones.
        rng = np.random.default_rng(seed)
        u, c = rng.normal(size=self._shapes[0]), rng.normal(size=self._shapes[1])
        rest = sum(int(np.prod(shape)) for shape in self._shapes[2:])
        return np.concatenate([u.ravel(), c, np.zeros(rest)])

    def _parts(self, flat: FloatArray) -> list[FloatArray]:
        ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), self._shapes, strict=True)]
