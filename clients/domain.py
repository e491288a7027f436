"""A client's domain model: frozen MiniLM vectors under a regularised linear head, and FedAvg of such heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from promptfed.types import Encoder, FloatArray

# Strength of the L2 penalty relative to one text. 0.4 predicts a point better on held-out texts of sentiment5's train
# split, but its votes are less clear: weak words ("not") come among the label words.
PENALTY = 0.1


class LinearHead:
    """Softmax regression with soft targets: W (K, d), b (K), flat as ``concatenate([W.ravel(), b])``.

    Minimises sum_i cross-entropy(targets_i, softmax(W x_i + b)) + PENALTY/2 * |W|^2: for three labels or more the
    objective of scikit-learn's LogisticRegression(C=1/PENALTY), extended to soft targets. For two labels it is that of
    C=2/PENALTY: scikit-learn has one row w there, and the rows (-w/2, w/2) have half its square.
    """

    def __init__(self, n_labels: int, flat: FloatArray | None = None) -> None:
        self.n_labels = n_labels
        self.flat = flat

    def fit(self, x: FloatArray, targets: FloatArray, *, max_iter: int = 200) -> LinearHead:
        """``x`` (n, d); ``targets`` (n, K), rows sum to 1. Starts from the weights that it has."""
        n_weights = self.n_labels * x.shape[1]
        start = np.zeros(n_weights + self.n_labels) if self.flat is None else self.flat

        def objective(flat: FloatArray) -> tuple[float, FloatArray]:
            w, b = flat[:n_weights].reshape(self.n_labels, -1), flat[n_weights:]
            logp = log_softmax(x @ w.T + b, axis=1)
            error = np.exp(logp) * targets.sum(axis=1, keepdims=True) - targets
            value = -(targets * logp).sum() + PENALTY / 2 * (w**2).sum()
            return value, np.concatenate([(error.T @ x + PENALTY * w).ravel(), error.sum(axis=0)])

        self.flat = np.asarray(minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": max_iter}).x)
        return self

    def predict_proba(self, x: FloatArray) -> FloatArray:
        """(n, K). An unfitted head is uniform."""
        if self.flat is None:
            return np.full((len(x), self.n_labels), 1.0 / self.n_labels)
        w, b = self.flat[: -self.n_labels].reshape(self.n_labels, -1), self.flat[-self.n_labels :]
        return np.asarray(softmax(x @ w.T + b, axis=1))


class LinearDomainModel:
    """`promptfed.types.DomainModel`: an encoder and a `LinearHead`."""

    def __init__(self, encoder: Encoder, n_labels: int) -> None:
        self._encoder, self.head = encoder, LinearHead(n_labels)

    def fit(self, texts: Sequence[str], targets: FloatArray) -> LinearDomainModel:
        self.head = LinearHead(self.head.n_labels).fit(self._encoder.encode(texts), targets)
        return self

    def predict_proba(self, texts: Sequence[str]) -> FloatArray:
        return self.head.predict_proba(self._encoder.encode(texts))


def out_of_fold(x: FloatArray, targets: FloatArray, *, folds: int = 5) -> FloatArray:
    """Probabilities (n, K) of each text by a head that did not see it. Fold of text i is i mod ``folds``.

    With fewer texts than folds each text is left out alone; a single text gets the uniform prediction.
    """
    n, n_labels = targets.shape
    out = np.full((n, n_labels), 1.0 / n_labels)
    fold = np.arange(n) % min(folds, n)
    for f in np.unique(fold):
        held = fold == f
        if not held.all():
            out[held] = LinearHead(n_labels).fit(x[~held], targets[~held]).predict_proba(x[held])
    return out


def smoothed(proba: FloatArray) -> FloatArray:
    """Finite log-probabilities for stacking."""
    return np.log(np.clip(proba, 1e-4, None))
