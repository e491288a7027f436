"""How one client predicts: the arms of an evaluation, from a prompt alone to prompt and domain model together."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from clients.cascade import Passed, passed_through
from clients.data import ClientData
from clients.distillation import from_others
from clients.domain_models.base import smoothed
from clients.learning import Learning
from clients.personal import Chosen, choose
from clients.scores import ScoreStore
from promptfed.errors import RunError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.messages import Evaluate, Offer
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, NewtonSums, cross_fitted_proba, fit, sums
from promptfed.types import DomainModel, FloatArray

# arm -> what it is; the order is the order of tables.
ARMS = {
    "fm": "the tuned set of prompts, calibrated by each client",
    "fm_pooled": "the tuned set with the pooled calibration: what a new client without labels gets",
    "fm_single": "the best prompt alone, calibrated by each client",
    "fm_single_pooled": "the best prompt alone, with the pooled calibration",
    "fm_personal": "what each client chose for itself: the tuned set, or a better one by a test on its own texts",
    "fm_dm": "the tuned set and the client's domain model, weighed together",
    "cascade": "the domain model where it is sure enough, else with one prompt, else with the set",
    "dm_local": "the client's domain model alone, of its labelled texts",
    "dm_distilled": "the client's domain model alone, of its labelled texts and of what the FM said of others",
    "dm_fedavg": "the domain model whose parameters are averaged over the clients of its kind (FedAvg)",
    "dm_fedprox": "the same, each client held to the average (FedProx)",
    "dm_fedadam": "the same, with Adam at the server (FedAdam)",
    "dm_ensemble": "the client's domain model, of its labelled texts and of all domain models' votes on public texts",
    "zero_shot": "the instruction alone, as the FM answers it",
    "manual_few_shot": "a hand-written prompt with exemplars, as the FM answers it",
    "manual_few_shot_calibrated": "the hand-written prompt, calibrated by each client",
    "local_only": "each client tunes alone, with its share of the calls",
    "centralised": "all texts in one place, the same calls, calibrated by each client",
}
POOLED = frozenset({"fm_pooled", "fm_single_pooled"})
RAW = frozenset({"zero_shot", "manual_few_shot"})
AVERAGED = frozenset({"dm_fedavg", "dm_fedprox", "dm_fedadam"})
DOMAIN = AVERAGED | {"dm_local", "dm_distilled", "dm_ensemble"}


def kind_of(arm: str) -> str:
    """``fm_pooled@500`` is ``fm_pooled`` as it was after 500 FM calls."""
    return arm.partition("@")[0]


class Arms:
    """Predictions of one client on its held-out texts. FM answers are kept, so arms that share prompts share calls."""

    def __init__(
        self,
        data: ClientData,
        train_scores: ScoreStore,
        n_labels: int,
        domain: Learning,
    ) -> None:
        self._data, self._train, self._n_labels, self._domain = data, train_scores, n_labels, domain
        self._test = ScoreStore(data.test, n_labels)
        self._chosen: dict[tuple[PromptSet, Offer], Chosen] = {}

    def calibrate(self, prompt: PromptSet, stop: int | None = None) -> Calibration:
        """The client's own bias and weights, held to the pooled ones shifted to its label proportions.

        ``stop``: on its texts [0, stop) only.
        """
        scores, labels, _ = self._train.get(prompt.prompts, stop)
        return fit(scores, labels, towards=prompt.pooled.shifted(self._train.log_prior))

    def choose(self, prompt: PromptSet, offer: Offer) -> Chosen:
        """What the client uses of ``prompt`` and what is on ``offer``; worked out once, when tuning is over."""
        if (prompt, offer) not in self._chosen:
            self._chosen[prompt, offer] = choose(self._train, prompt, offer)
        return self._chosen[prompt, offer]

    def stack_sums(self, prompt: PromptSet, weights: tuple[float, ...]) -> NewtonSums:
        """This client's part of a Newton step at ``weights`` of (FM, domain model), over the texts that it has scored.

        Both are seen as they are on texts that they were not fitted on: under cross-fitted calibration, and the domain
        model out of fold.
        """
        scores, labels, rows = self._train.get(prompt.prompts)
        pooled = prompt.pooled.shifted(self._train.log_prior)
        fm = np.log(cross_fitted_proba(scores, labels, towards=pooled))
        sources = np.stack([fm, self._domain.judged[rows] - self._train.log_prior], axis=1)
        total = sums(sources, labels, Calibration(weights=weights, bias=(0.0,) * self._n_labels))
        n = len(weights)
        return NewtonSums(n=total.n, loss=total.loss, gradient=total.gradient[:n], hessian=total.hessian[:n, :n])

    def _domain_logits(self, logp: FloatArray) -> FloatArray:
        """Calibrated, less the label proportions (n, K): the FM's calibration knows them, and they count once."""
        return np.asarray(self._domain.calibration.logits(logp[:, None]) - self._train.log_prior)

    def _weighed(self, prompt: PromptSet, stack: tuple[float, ...], logp: FloatArray) -> FloatArray:
        """Probabilities (n_test, K) of FM and domain model together; ``logp`` (n_test, K) is what the latter says."""
        scores = self._test.get(prompt.prompts)[0]
        logits = stack[0] * self.calibrate(prompt).logits(scores) + stack[1] * self._domain_logits(logp)
        return np.asarray(softmax(logits, axis=1))

    async def cascade(self, task: Evaluate, fm: BaseFM) -> tuple[Passed, float]:
        """What comes of ``task.cascade`` on the held-out texts, and the FM calls that one prediction takes."""
        if task.cascade is None or task.prompt is None or len(task.stack) != 2:
            raise RunError(f"arm {task.arm!r} needs a prompt, the weights of FM and domain model, and thresholds")
        single, prompt, stack = task.cascade.single, task.prompt, task.stack
        await self._test.ask(fm, [*single.prompts, *prompt.prompts], len(self._data.test))
        logp = smoothed(self._domain.model.predict_proba(self._data.test.texts))
        stages = (
            lambda: self._domain.calibration.predict_proba(logp[:, None]),
            lambda: self._weighed(single, stack, logp),
            lambda: self._weighed(prompt, stack, logp),
        )
        passed = passed_through(stages, task.cascade.thresholds)
        return passed, passed.calls(task.cascade, prompt)

    async def predict(self, task: Evaluate, fm: BaseFM) -> tuple[FloatArray, float]:
        """Probabilities (n_test, K) of ``task.arm`` and the FM calls that one prediction takes."""
        if kind_of(task.arm) not in ARMS:
            raise UnknownNameError("arm", task.arm, ARMS)
        if task.arm == "cascade":
            passed, calls = await self.cascade(task, fm)
            return passed.proba, calls
        if task.arm in DOMAIN:
            return self._domain_model_of(task).predict_proba(self._data.test.texts), 0.0
        if task.prompt is None:
            raise RunError(f"arm {task.arm!r} needs a prompt")
        prompt = task.prompt
        if kind_of(task.arm) == "fm_personal" and task.offer is not None:
            prompt = self.choose(prompt, task.offer).prompt
        await self._test.ask(fm, prompt.prompts, len(self._data.test))
        scores = self._test.get(prompt.prompts)[0]
        calls = float(len(prompt.prompts))
        if task.arm in RAW:
            return np.exp(scores[:, 0]), calls
        if kind_of(task.arm) in POOLED:
            return prompt.pooled.predict_proba(scores), calls
        if task.arm == "fm_dm":
            if len(task.stack) != 2:
                raise RunError(f"arm {task.arm!r} needs the weights of FM and domain model")
            logp = smoothed(self._domain.model.predict_proba(self._data.test.texts))
            return self._weighed(prompt, task.stack, logp), calls
        return self.calibrate(prompt, task.stop).predict_proba(scores), calls

    def _domain_model_of(self, task: Evaluate) -> DomainModel:
        """The domain model that ``task`` is about."""
        if task.arm in AVERAGED:
            return self._domain.with_parameters(task.parameters)
        if task.arm == "dm_ensemble":
            if task.lessons is None:
                raise RunError(f"arm {task.arm!r} needs votes on public texts")
            return self._domain.of(from_others(task.lessons, self._n_labels))
        return self._domain.own if task.arm == "dm_local" else self._domain.model
