"""Which owners to ask: how likely each is to hold what a query looks for, and how many are worth asking.

A router sees queries' vectors and the owners' noised centroids, no document. As in RAGRoute (Guerraoui et al., 2025),
owners are chosen for each query before anything is sent. Unlike there, the router learns from what was found, and not
from relevance labels, and how many owners are asked may follow how sure it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from promptfed.types import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
# Cosine to a centroid that makes an owner e times as likely, inverted.
SHARPNESS = 20.0
# Strength of the L2 penalty of a learned router, relative to one query.
PENALTY = 1.0


class Router(Protocol):
    """Says which owners are likely to hold what queries look for."""

    def probabilities(self, queries: FloatArray, centroids: Mapping[str, FloatArray]) -> FloatArray:
        """(n, C), rows sum to 1, owners in the order of ``centroids``: each (d,), as it was released, a sum with noise.
        ``queries`` (n, d). There may be other owners than there were when the router learned."""
        ...


def likeness(queries: FloatArray, centroids: FloatArray) -> FloatArray:
    """Cosines (n, C) of queries and centroids. Less the centroids' mean, which tells no owner apart, they route worse:
    a short query does not hold what long passages have in common."""
    return np.asarray(_unit(queries) @ _unit(centroids).T)


class CentroidRouter:
    """Softmax over the `likeness` to centroids."""

    def probabilities(self, queries: FloatArray, centroids: Mapping[str, FloatArray]) -> FloatArray:
        return np.asarray(softmax(SHARPNESS * likeness(queries, _table(centroids)), axis=1))


class LearnedRouter:
    """A softmax regression on the query's vector beside its likeness to the centroids, learned from earlier searches
    that asked everybody: softmax(W q + b + s likeness). Of an owner that it has not learned, W and b are 0, as those of
    all others are on average."""

    def __init__(self) -> None:
        self._of: dict[str, FloatArray] = {}  # each owner's row of W, and its b
        self._sharpness = SHARPNESS

    def fit(self, queries: FloatArray, centroids: Mapping[str, FloatArray], shares: FloatArray) -> LearnedRouter:
        """``shares`` (n, C), rows sum to 1: how much of what each query found was whose (`shares_of`)."""
        x = np.concatenate([queries, np.ones((len(queries), 1))], axis=1)
        near = likeness(queries, _table(centroids))
        n_owners, size = len(centroids), x.shape[1]

        def objective(flat: FloatArray) -> tuple[float, FloatArray]:
            w, sharpness = flat[:-1].reshape(n_owners, size), flat[-1]
            logp = log_softmax(x @ w.T + sharpness * near, axis=1)
            error = np.exp(logp) - shares
            free = w[:, :-1]
            gradient = error.T @ x
            gradient[:, :-1] += PENALTY * free
            value = -(shares * logp).sum() + PENALTY / 2 * (free**2).sum()
            return value, np.append(gradient.ravel(), (error * near).sum())

        start = np.append(np.zeros(n_owners * size), SHARPNESS)
        found = np.asarray(minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x)
        weights = found[:-1].reshape(n_owners, size)
        self._of = dict(zip(centroids, weights - weights.mean(axis=0), strict=True))
        self._sharpness = float(found[-1])
        return self

    def probabilities(self, queries: FloatArray, centroids: Mapping[str, FloatArray]) -> FloatArray:
        nothing = np.zeros(queries.shape[1] + 1)
        weights = np.array([self._of.get(owner, nothing) for owner in centroids])
        logits = queries @ weights[:, :-1].T + weights[:, -1]
        return np.asarray(softmax(logits + self._sharpness * likeness(queries, _table(centroids)), axis=1))


def shares_of(scores: FloatArray, owners: Sequence[Sequence[int]], n_owners: int) -> FloatArray:
    """What a `LearnedRouter` learns from: each query's hits by owner, (n, C), rows sum to 1; even ones without a hit.

    ``scores`` (n, k) are cosines of the hits and -inf where there is none, ``owners`` whose they are. A hit counts
    exp(30 (cosine - best cosine)): one that is 0.1 behind the best a twentieth.
    """
    weight = np.exp(30 * (scores - np.maximum(scores.max(axis=1, initial=-1.0, keepdims=True), -1.0)))
    out = np.zeros((len(scores), n_owners))
    for row, mine, whose in zip(out, weight, owners, strict=True):
        np.add.at(row, np.asarray(whose, dtype=np.int64), mine[: len(whose)])
    empty = out.sum(axis=1) == 0
    out[empty] = 1.0
    return np.asarray(out / out.sum(axis=1, keepdims=True))


def chosen(probabilities: FloatArray, *, n_ask: int | None = None, coverage: float | None = None) -> BoolArray:
    """Whom to ask, (n, C): the ``n_ask`` most likely owners, or the most likely until one of them is the right one with
    probability ``coverage``: many for a query that might be anybody's, few for one that is plainly somebody's. Of both,
    whichever asks fewer; of neither, all."""
    order, before = _before(probabilities)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(probabilities.shape[1])[None], axis=1)
    out = np.ones(probabilities.shape, dtype=np.bool_)
    if n_ask is not None:
        out &= rank < n_ask
    if coverage is not None:
        out &= np.take_along_axis(before, rank, axis=1) < coverage
    return out


def coverage_for(probabilities: FloatArray, n_ask: float) -> float:
    """The coverage with which queries like these (n, C) ask ``n_ask`` owners on average, or a little fewer."""
    _, before = _before(probabilities)
    wanted = round(n_ask * len(before))
    every = np.sort(before, axis=None)
    return float(every[wanted]) if wanted < every.size else 1.0


def _before(probabilities: FloatArray) -> tuple[IntArray, FloatArray]:
    """The owners of each query from the likeliest on, and how likely those before each are together."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    total = np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1)
    return order, np.concatenate([np.zeros((len(total), 1)), total[:, :-1]], axis=1)


def _table(centroids: Mapping[str, FloatArray]) -> FloatArray:
    return np.array(list(centroids.values()))


def _unit(vectors: FloatArray) -> FloatArray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))
