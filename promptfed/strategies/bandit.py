"""Linear bandits, pure numpy: which arm to pull next, when an arm's worth is about linear in its features.

`LinearBandit` is LinUCB (Li et al., WWW 2010, arXiv 1003.0146, algorithm 1; Abbasi-Yadkori et al., NeurIPS 2011):
ridge regression and the width of its confidence ellipsoid,

    A = ridge * I + sum_i n_i x_i x_i^T,    theta = A^-1 sum_i n_i r_i x_i,    width(x) = sqrt(x^T A^-1 x)         (1)

`DuelBandit` learns from comparisons (Saha, NeurIPS 2021): with d = x_a - x_b, P(a is better) =
sigmoid(theta^T d), theta by penalised maximum likelihood, and A as in (1) with d in the place of x.

Feedback comes in batches: an arm that was dealt and not yet scored counts in A, so that the next one dealt is another,
but not in theta (Desautels et al., JMLR 15, 2014, arXiv 1206.6402: "hallucinated" feedback).
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from promptfed.types import FloatArray

# Newton steps of a fit from zero at most, and the expected gain in log-likelihood below which it ends.
MAX_STEPS, TOLERANCE = 50, 1e-10


class _Ellipsoid:
    """A of equation (1), with and without what is pending. ``n`` is a weight: how many pulls an observation counts."""

    def __init__(self, dimension: int, ridge: float) -> None:
        self.gram = ridge * np.eye(dimension)
        self._pending = np.zeros_like(self.gram)

    def expect(self, x: FloatArray, n: float = 1.0) -> None:
        """Count ``x`` (d,) as dealt, until the bandit is built anew with what came of it."""
        self._pending += n * np.outer(x, x)

    def width(self, x: FloatArray) -> FloatArray:
        """Half-widths (n,) at the rows of ``x`` (n, d), in standard deviations of one pull's noise."""
        return np.asarray(np.sqrt(np.einsum("nd,dn->n", x, np.linalg.solve(self.gram + self._pending, x.T))))


class LinearBandit(_Ellipsoid):
    """LinUCB's statistics; rewards are higher for better."""

    def __init__(self, dimension: int, ridge: float) -> None:
        super().__init__(dimension, ridge)
        self._moment = np.zeros(dimension)

    def observe(self, x: FloatArray, reward: float, n: float = 1.0) -> None:
        """``reward`` is the mean over ``n`` pulls of the arm with features ``x`` (d,)."""
        self.gram += n * np.outer(x, x)
        self._moment += n * reward * x

    @property
    def theta(self) -> FloatArray:
        """(d,)."""
        return np.asarray(np.linalg.solve(self.gram, self._moment))


class DuelBandit(_Ellipsoid):
    """Statistics of duels; ``dimension`` and ``ridge`` as in `LinearBandit`.

    Near a tie a duel has a quarter of the information of a reward with unit noise, so the ridge on the likelihood is a
    quarter of the one in A, and the standard deviation of theta^T d is twice `width`.
    """

    def __init__(self, dimension: int, ridge: float) -> None:
        super().__init__(dimension, ridge)
        self._ridge = ridge / 4.0
        self._duels: list[tuple[FloatArray, float, float]] = []

    def observe(self, difference: FloatArray, won: float, n: float = 1.0) -> None:
        """``won`` is the share in [0, 1] of ``n`` duels that the first arm won, ``difference`` (d,) = its features less
        the second's."""
        self.gram += n * np.outer(difference, difference)
        self._duels.append((difference, won, n))

    @property
    def theta(self) -> FloatArray:
        """(d,), in log-odds."""
        theta = np.zeros(len(self.gram))
        if not self._duels:
            return theta
        x, won, n = (np.array(column) for column in zip(*self._duels, strict=True))

        def loss(at: FloatArray) -> float:
            logits = x @ at
            return float((n * (np.logaddexp(0.0, logits) - won * logits)).sum() + self._ridge / 2 * (at**2).sum())

        for _ in range(MAX_STEPS):
            p = expit(x @ theta)
            gradient = x.T @ (n * (p - won)) + self._ridge * theta
            hessian = (x.T * (n * p * (1 - p))) @ x + self._ridge * np.eye(len(theta))
            step = np.linalg.solve(hessian, gradient)
            gain = float(gradient @ step)
            if gain < TOLERANCE:
                break
            # A whole Newton step may leap over the minimum where duels are one-sided: halve it until it descends.
            size = 1.0
            while loss(theta - size * step) > loss(theta) - 1e-4 * size * gain and size > 1e-6:
                size /= 2
            theta = theta - size * step
        return theta
