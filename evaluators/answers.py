"""Metrics of written answers, and their standard errors. Higher is better in all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from promptfed.prompts.answers import normalised
from promptfed.types import FloatArray


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same once they are `normalised`, else 0."""
    return float(normalised(answer) == normalised(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, in [0, 1] (Rajpurkar et al., EMNLP 2016, arXiv
    1606.05250, section 6.1). Where one has no words: 1 if neither has any, else 0."""
    a, b = normalised(answer).split(), normalised(reference).split()
    if not a or not b:
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2.0 * shared / (len(a) + len(b))


METRICS: dict[str, Callable[[str, str], float]] = {"token_f1": token_f1, "exact_match": exact_match}
PRIMARY = "token_f1"


def per_text(answers: Sequence[str | None], references: Sequence[str]) -> dict[str, FloatArray]:
    """Every metric of each answer, (n,). An answer that the FM failed to give (None) is worth 0."""
    pairs = list(zip(answers, references, strict=True))
    return {
        name: np.array([0.0 if answer is None else metric(answer, reference) for answer, reference in pairs])
        for name, metric in METRICS.items()
    }


def with_errors(values: Mapping[str, FloatArray]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of every metric over texts and its standard error, which is what a bootstrap comes to."""
    means = {name: float(v.mean()) for name, v in values.items()}
    return means, {name: float(v.std() / np.sqrt(len(v))) for name, v in values.items()}
