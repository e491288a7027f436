"""How one client predicts: the arms of an evaluation, from a prompt alone to prompt and domain model together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clients.data import ClientData
from clients.domain import LinearDomainModel, LinearHead, out_of_fold, smoothed
from clients.scores import ScoreStore
from promptfed.errors import RunError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.messages import Evaluate
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, fit
from promptfed.types import Encoder, FloatArray

# arm -> what it is; the order is the order of tables.
ARMS = {
    "fm": "the tuned set of prompts, calibrated by each client",
    "fm_pooled": "the tuned set with the pooled calibration: what a new client without labels gets",
    "fm_single": "the best prompt alone, calibrated by each client",
    "fm_dm": "the tuned set and the client's domain model, stacked",
    "dm_local": "the client's domain model alone",
    "dm_fedavg": "one linear head, averaged over the clients (FedAvg)",
    "zero_shot": "the instruction alone, as the FM answers it",
    "manual_few_shot": "a hand-written prompt with exemplars, as the FM answers it",
    "manual_few_shot_calibrated": "the hand-written prompt, calibrated by each client",
    "local_only": "each client tunes alone, with its share of the calls",
    "centralised": "all texts in one place, the same calls, calibrated by each client",
}
# s of a stacker's fit: what it starts from is fitted already. 4 to 100 do alike on held-out texts of the train split.
STACK_STRENGTH = 16.0
RAW = frozenset({"zero_shot", "manual_few_shot"})


class Arms:
    """Predictions of one client on its held-out texts. FM answers are kept, so arms that share prompts share calls."""

    def __init__(
        self,
        data: ClientData,
        train_scores: ScoreStore,
        n_labels: int,
        encoder: Encoder,
        domain_model: Callable[[], LinearDomainModel],
    ) -> None:
        self._data, self._train, self._n_labels = data, train_scores, n_labels
        self._encoder, self._domain_model = encoder, domain_model
        self._test = ScoreStore(data.test, n_labels)

    def calibrate(self, prompt: PromptSet) -> Calibration:
        """The client's own bias and weights, held to the pooled ones shifted to its label proportions."""
        scores, labels, _ = self._train.get(prompt.prompts)
        pooled = Calibration(weights=prompt.weights, bias=prompt.bias)
        return fit(scores, labels, towards=pooled.shifted(self._train.log_prior))

    def stack(self, prompt: PromptSet) -> Calibration:
        """Weights of the prompts and of the domain model, fitted on the domain model's out-of-fold predictions.

        The fit starts from both as they are calibrated alone: the domain model on all training texts, which are more
        than those that the FM scored.
        """
        scores, labels, rows = self._train.get(prompt.prompts)
        own = self.calibrate(prompt)
        everything = self._data.train
        x = self._encoder.encode(everything.texts)
        held_out = smoothed(out_of_fold(x, np.eye(self._n_labels)[everything.labels]))
        unchanged = Calibration(weights=(1.0,), bias=(0.0,) * self._n_labels)
        domain = fit(held_out[:, None], everything.labels, towards=unchanged)
        start = Calibration(weights=(*own.weights, *domain.weights), bias=own.bias)
        # Both know the label proportions: they must not count twice.
        start = start.shifted(np.asarray(domain.bias) - self._train.log_prior)
        return fit(with_source(scores, held_out[rows]), labels, towards=start, strength=STACK_STRENGTH)

    async def predict(self, task: Evaluate, fm: BaseFM) -> tuple[FloatArray, float]:
        """Probabilities (n_test, K) of ``task.arm`` and the FM calls that one prediction takes."""
        if task.arm not in ARMS:
            raise UnknownNameError("arm", task.arm, ARMS)
        if task.arm == "dm_local":
            return self._domain_model().predict_proba(self._data.test.texts), 0.0
        if task.arm == "dm_fedavg":
            head = LinearHead(self._n_labels, np.array(task.head))
            return head.predict_proba(self._encoder.encode(self._data.test.texts)), 0.0
        if task.prompt is None:
            raise RunError(f"arm {task.arm!r} needs a prompt")
        prompt = task.prompt
        await self._test.ask(fm, prompt.prompts, len(self._data.test))
        scores = self._test.get(prompt.prompts)[0]
        calls = float(len(prompt.prompts))
        if task.arm in RAW:
            return np.exp(scores[:, 0]), calls
        if task.arm == "fm_pooled":
            return Calibration(weights=prompt.weights, bias=prompt.bias).predict_proba(scores), calls
        if task.arm == "fm_dm":
            domain = smoothed(self._domain_model().predict_proba(self._data.test.texts))
            return self.stack(prompt).predict_proba(with_source(scores, domain)), calls
        return self.calibrate(prompt).predict_proba(scores), calls


def with_source(scores: FloatArray, source: FloatArray) -> FloatArray:
    """Append a source's log-probabilities (n, K) to ``scores`` (n, J, K)."""
    return np.concatenate([scores, source[:, None]], axis=1)
