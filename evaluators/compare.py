"""Paired comparison of two arms or two runs on the same texts.

Seeds are averaged per text first, then texts are resampled within clients (clients themselves only matter as strata:
with a handful of them, resampling clients says nothing). The figure compared is the mean over clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from promptfed.errors import DataError
from promptfed.types import FloatArray

PerText = Mapping[str, FloatArray]  # client -> value a text, shape (n,) or (n_seeds, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Difference of means over clients, a - b, with a 95% bootstrap interval and a two-sided bootstrap p-value."""

    mean_a: float
    mean_b: float
    difference: float
    ci95: tuple[float, float]
    p_value: float
    n_texts: int


def compare(a: PerText, b: PerText, *, seed: int = 0, n_resamples: int = 4000) -> Comparison:
    """Compare ``a`` with ``b``. Both give, for each client, the same texts in the same order."""
    if set(a) != set(b) or not a:
        raise DataError(
            f"the two sides have clients {', '.join(sorted(a))} and {', '.join(sorted(b))}; expected the same"
        )
    rng = np.random.default_rng(seed)
    means_a, means_b, draws = [], [], []
    n_texts = 0
    for client in sorted(a):
        x, y = _per_text(a[client]), _per_text(b[client])
        if x.shape != y.shape:
            raise DataError(f"client {client!r} has {len(x)} texts on one side and {len(y)} on the other")
        means_a.append(x.mean())
        means_b.append(y.mean())
        draws.append(_resampled_means(x - y, rng, n_resamples))
        n_texts += len(x)
    difference = float(np.mean(means_a) - np.mean(means_b))
    replicates = np.mean(draws, axis=0)
    low, high = np.quantile(replicates, [0.025, 0.975])
    tail = min((replicates <= 0).mean(), (replicates >= 0).mean())
    return Comparison(
        mean_a=float(np.mean(means_a)),
        mean_b=float(np.mean(means_b)),
        difference=difference,
        ci95=(float(low), float(high)),
        p_value=float(min(1.0, 2 * max(tail, 1 / n_resamples))),
        n_texts=n_texts,
    )


def mean_interval(values: PerText, *, seed: int = 0, n_resamples: int = 4000) -> tuple[float, tuple[float, float]]:
    """Mean over clients of the mean over texts, with its 95% bootstrap interval."""
    rng = np.random.default_rng(seed)
    per_client = [_per_text(values[c]) for c in sorted(values)]
    replicates = np.mean([_resampled_means(x, rng, n_resamples) for x in per_client], axis=0)
    low, high = np.quantile(replicates, [0.025, 0.975])
    return float(np.mean([x.mean() for x in per_client])), (float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return [float(p) for p in adjusted]


def _per_text(values: FloatArray) -> FloatArray:
    return np.asarray(np.atleast_2d(np.asarray(values, dtype=np.float64)).mean(axis=0))


def _resampled_means(x: FloatArray, rng: np.random.Generator, n_resamples: int) -> FloatArray:
    counts = rng.multinomial(len(x), np.full(len(x), 1.0 / len(x)), size=n_resamples)
    return np.asarray(counts @ x / len(x))
