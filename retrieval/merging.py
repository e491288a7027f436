"""Rankings of several searches made into one.

A `Merge` turns the owners' scores into scores that can be compared; `retrieval.federated` sorts by them. Cosines of one
encoder can be compared as they are. Of different encoders, or of BM25 over different collections, they can't: CORI
rescales them by each owner's range and by how likely the owner is; reciprocal ranks look at the order alone. Over
disjoint indices these take the owners' hits in turns, so they need a router, or a cross-encoder after them, to be good.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from promptfed.errors import UnknownNameError
from promptfed.types import Encoder, FloatArray

Key = TypeVar("Key", bound=Hashable)

# Cormack, Clarke & Buettcher (SIGIR 2009) find 60 good on all they tried.
RRF_K = 60


class Merge(Protocol):
    """Makes scores of several owners comparable."""

    def __call__(self, scores: FloatArray, weights: FloatArray) -> FloatArray:
        """``scores`` (n, C, k): each owner's, the best first, -inf where there is no hit. ``weights`` (n, C): how
        likely each owner is to hold what the query looks for. Gives (n, C, k), -inf in the same places."""
        ...


class CrossEncoder(Protocol):
    """Reads a query together with a passage, and says how well they go together."""

    def scores(self, query: str, passages: Sequence[str]) -> Sequence[float]:
        """One a passage, higher is better."""
        ...


class ReadAgain:
    """The asker's own encoder as a `CrossEncoder`: cosines that can be compared, whatever the owners search with. It
    needs their texts."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def scores(self, query: str, passages: Sequence[str]) -> list[float]:
        both = self._encoder.encode([query, *passages])
        out: list[float] = (both[1:] @ both[0]).tolist()
        return out


def by_score(scores: FloatArray, weights: FloatArray) -> FloatArray:  # noqa: ARG001  (a `Merge`)
    """The scores as they are: of one shared encoder."""
    return scores


def cori(scores: FloatArray, weights: FloatArray) -> FloatArray:
    """CORI's merging (Callan, Lu & Croft, SIGIR 1995; Callan, 2000): (D + 0.4 D C) / 1.4, where D is a hit's score and
    C its owner's, each brought to [0, 1] by its range: of D over the owner's hits, of C over the owners asked."""
    there = np.isfinite(scores)
    within = _scaled(scores, there, axis=2)
    asked = there.any(axis=2)
    between = _scaled(np.where(asked, weights, -np.inf), asked, axis=1)
    return np.where(there, (within + 0.4 * within * between[:, :, None]) / 1.4, -np.inf)


def by_rank(scores: FloatArray, weights: FloatArray) -> FloatArray:
    """Reciprocal rank fusion over owners that share no passage: 1 / (60 + rank), equal ranks by the owner's weight."""
    rank = 1.0 + np.arange(scores.shape[2])
    # Less than the difference of any two ranks.
    by_weight = 1e-9 * weights[:, :, None]
    return np.where(np.isfinite(scores), 1.0 / (RRF_K + rank) + by_weight, -np.inf)


def by_name(name: str) -> Merge:
    """``score``, ``cori`` or ``rank``. Raises `UnknownNameError`."""
    known: dict[str, Merge] = {"score": by_score, "cori": cori, "rank": by_rank}
    if name not in known:
        raise UnknownNameError("merge", name, known)
    return known[name]


def reciprocal_ranks(rankings: Iterable[Sequence[Key]]) -> list[tuple[Key, float]]:
    """Reciprocal rank fusion (Cormack, Clarke & Buettcher, SIGIR 2009): each list gives 1 / (60 + rank), the first rank
    being 1, and what a list does not have gets nothing of it. Equal sums keep the order of their first appearance."""
    total: dict[Key, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, start=1):
            total[key] = total.get(key, 0.0) + 1.0 / (RRF_K + rank)
    return sorted(total.items(), key=lambda item: -item[1])


def _scaled(values: FloatArray, there: Any, axis: int) -> FloatArray:
    """To [0, 1] over what is there along ``axis``; 1 where all are equal."""
    low = np.where(there, values, np.inf).min(axis=axis, keepdims=True, initial=np.inf)
    high = np.where(there, values, -np.inf).max(axis=axis, keepdims=True, initial=-np.inf)
    span = np.where(np.isfinite(low) & (high > low), high - low, 1.0)
    scaled = (np.where(there, values, 0.0) - np.where(np.isfinite(low), low, 0.0)) / span
    return np.where(there, np.where(high > low, scaled, 1.0), 0.0)
