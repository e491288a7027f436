"""Rankings of several searches made into one. All take lists with the best first and give the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

# Cormack, Clarke & Buettcher (SIGIR 2009) find 60 good on all they tried.
RRF_K = 60


def reciprocal_ranks(rankings: Iterable[Sequence[Key]]) -> list[tuple[Key, float]]:
    """Reciprocal rank fusion (Cormack, Clarke & Buettcher, SIGIR 2009): each list gives 1 / (60 + rank), the first rank
    being 1, and what a list does not have gets nothing of it. Equal sums keep the order of their first appearance."""
    total: dict[Key, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, start=1):
            total[key] = total.get(key, 0.0) + 1.0 / (RRF_K + rank)
    return sorted(total.items(), key=lambda item: -item[1])
