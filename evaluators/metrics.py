"""Metrics of label probabilities. Shapes: ``proba`` (n, K), ``labels`` (n,). Undefined on no texts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from promptfed.types import FloatArray, IntArray

N_BINS = 15


def accuracy(proba: FloatArray, labels: IntArray) -> float:
    """Share of texts whose most probable label is right. Higher is better."""
    return float((proba.argmax(axis=1) == labels).mean())


def macro_f1(proba: FloatArray, labels: IntArray) -> float:
    """F1 averaged over the labels that occur in ``labels`` or are predicted. Higher is better."""
    guess = proba.argmax(axis=1)
    scores = []
    for k in np.union1d(labels, guess):
        hits = int(((guess == k) & (labels == k)).sum())
        scores.append(2.0 * hits / int((guess == k).sum() + (labels == k).sum()))
    return float(np.mean(scores))


def ece(proba: FloatArray, labels: IntArray) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al., ICML 2017). Lower is better."""
    confidence = proba.max(axis=1)
    right = proba.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)
    gaps = [abs(confidence[bins == b].sum() - right[bins == b].sum()) for b in np.unique(bins)]
    return float(np.sum(gaps) / len(labels))


def brier(proba: FloatArray, labels: IntArray) -> float:
    """Mean squared distance to the one-hot label, in [0, 2] (Brier, 1950). Lower is better."""
    return float(((proba - np.eye(proba.shape[1])[labels]) ** 2).sum(axis=1).mean())


def nll(proba: FloatArray, labels: IntArray) -> float:
    """Mean negative log-likelihood in nats, probabilities clipped at 1e-12. Lower is better."""
    return float(-np.log(np.clip(proba[np.arange(len(labels)), labels], 1e-12, None)).mean())


METRICS: dict[str, Callable[[FloatArray, IntArray], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "ece": ece,
    "brier": brier,
    "nll": nll,
}
PRIMARY = "accuracy"


def with_errors(
    proba: FloatArray, labels: IntArray, rng: np.random.Generator, *, n_resamples: int = 200
) -> tuple[dict[str, float], dict[str, float]]:
    """Every metric and its bootstrap standard error over texts."""
    values = {name: metric(proba, labels) for name, metric in METRICS.items()}
    draws: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(n_resamples):
        rows = rng.integers(len(labels), size=len(labels))
        for name, metric in METRICS.items():
            draws[name].append(metric(proba[rows], labels[rows]))
    return values, {name: float(np.std(d, ddof=1)) for name, d in draws.items()}
