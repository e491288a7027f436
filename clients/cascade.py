"""Answers at three prices: the domain model alone, which asks the FM nothing; with the best prompt alone; with the set.

A stage answers what it is sure enough of, and passes on the rest. How sure is enough was found for all clients together
(`promptfed.federation.cascade`); being sure is the largest probability of the stage's calibrated prediction. In
training, each text is seen by models and calibrations that were not fitted on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from promptfed.messages import STAGES, Cascade, Risk, RiskCounts
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import cross_fitted_proba
from promptfed.types import FloatArray, IntArray

if TYPE_CHECKING:
    from clients.client import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What came of a cascade over n texts: probabilities (n, K), and which stage answered (n,)."""

    proba: FloatArray
    stage: IntArray

    def calls(self, cascade: Cascade, prompt: PromptSet) -> float:
        """FM calls that it takes on average: a prompt that was asked at one stage is not asked again."""
        single = {p.prompt_id for p in cascade.single.prompts}
        all_ = single | {p.prompt_id for p in prompt.prompts}
        return float(np.array([0, len(single), len(all_)])[self.stage].mean()) if len(self.stage) else 0.0

    def by_stage(self, labels: IntArray) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many texts each stage answered, and how many of them wrongly."""
        wrong = self.stage[self.proba.argmax(axis=1) != labels]
        answered, missed = (np.bincount(stages, minlength=len(STAGES)).tolist() for stages in (self.stage, wrong))
        return tuple(answered), tuple(missed)


def passed_through(stages: Sequence[Callable[[], FloatArray]], thresholds: Sequence[float]) -> Passed:
    """``stages`` give probabilities (n, K); each but the last answers where the largest reaches its threshold."""
    proba = stages[0]().copy()
    stage = np.zeros(len(proba), dtype=np.int64)
    for i, after in enumerate(stages[1:]):
        unsure = passes_on(proba, stage, i, thresholds)
        if unsure.any():
            stage[unsure] = i + 1
            proba[unsure] = after()[unsure]
    return Passed(proba=proba, stage=stage)


def passes_on(proba: FloatArray, stage: IntArray, i: int, thresholds: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Which texts (n,) are at stage ``i`` and not sure enough there."""
    return np.asarray((stage == i) & (proba.max(axis=1, initial=0.0) < thresholds[i]))


def risk_counts(client: Client, task: Risk) -> RiskCounts:
    """Of the texts that reach the stage after ``task.thresholds``: how many it would answer at each of the thresholds
    that are tried, and how many of those wrongly."""
    labels = client.data.train.labels
    domain = client.domain.judged
    proba = np.exp(domain)
    if task.thresholds:
        scores, _, rows = client.scores.get(task.single.prompts)
        pooled = task.single.pooled.shifted(client.scores.log_prior)
        single = np.log(cross_fitted_proba(scores, labels[rows], towards=pooled))
        weighed = task.stack[0] * single + task.stack[1] * (domain[rows] - client.scores.log_prior)
        unsure = proba[rows].max(axis=1, initial=0.0) < task.thresholds[0]
        proba, labels = softmax(weighed, axis=1)[unsure], labels[rows][unsure]
    answers = proba.max(axis=1, initial=0.0)[:, None] >= np.array(task.tried)
    wrong = answers & (proba.argmax(axis=1) != labels)[:, None]
    return RiskCounts(
        n=len(labels), answered=tuple(answers.sum(axis=0).tolist()), wrong=tuple(wrong.sum(axis=0).tolist())
    )
