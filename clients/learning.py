"""A client's domain model: of which kind it is, what it has learned from, and what it says of texts that it was not
fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from clients.data import ClientData
from clients.distillation import Taught, nothing
from clients.domain_models.base import Averageable, make_domain_model, out_of_fold, smoothed
from promptfed.errors import RunError
from promptfed.prompts.calibration import Calibration, cross_fitted_proba, fit
from promptfed.types import DomainModel, Encoder, FloatArray

# Local steps of a round of averaging; of a linear model, iterations of L-BFGS.
LOCAL_STEPS = 5
# What a text counts in a model that answers, against the model's own penalty: less is more regularisation. In one that
# votes a text counts whole, for clear votes (`clients.domain_models.linear.PENALTY`). Of 1 to 1/10, 1/5 to 1/3 do best
# beside the FM and alone, with 32 and 200 labels of sentiment5's train split; with 8, 1 does (docs/transfer.md).
ANSWERING = 1 / 3


class Student:
    """A domain model that is fitted on lessons too, whatever texts it is given; each counts ``count`` times as much."""

    def __init__(self, model: DomainModel, taught: Taught, count: float = ANSWERING) -> None:
        self._model, self._taught, self._count = model, taught, count

    def fit(self, texts: Sequence[str], targets: FloatArray) -> DomainModel:
        counted = self._count * np.concatenate([targets, self._taught.targets])
        return self._model.fit([*texts, *self._taught.texts], counted)

    def predict_proba(self, texts: Sequence[str]) -> FloatArray:
        return self._model.predict_proba(texts)


class Learning:
    def __init__(self, kind: str, encoder: Encoder, data: ClientData, n_labels: int, seed: int) -> None:
        self.kind, self._encoder, self._data, self._seed = kind, encoder, data, seed
        self.targets = np.eye(n_labels)[data.train.labels]
        self.taught = self._earlier = nothing(n_labels)

    def make(self) -> DomainModel:
        """An unfitted model of the client's kind; the same start at all clients."""
        return make_domain_model(self.kind, self._encoder, self.targets.shape[1], seed=self._seed)

    @cached_property
    def own(self) -> DomainModel:
        """Of the client's labelled texts alone."""
        return self.of(nothing(self.targets.shape[1]))

    @cached_property
    def model(self) -> DomainModel:
        """The domain model that answers: of labelled texts and lessons."""
        return self.of(self.taught) if len(self.taught) else self.own

    @cached_property
    def voter(self) -> DomainModel:
        """The same for votes on public and FM-written texts."""
        return Student(self.make(), self.taught, count=1.0).fit(self._data.train.texts, self.targets)

    @cached_property
    def held_out(self) -> FloatArray:
        """The log-probabilities (n, K) of each labelled text by a model that did not see it."""
        return smoothed(out_of_fold(lambda: Student(self.make(), self.taught), self._data.train.texts, self.targets))

    @cached_property
    def calibration(self) -> Calibration:
        """Of the domain model for texts without a label, on all labelled texts, which are more than the FM scored."""
        return fit(self.held_out[:, None], self._data.train.labels, towards=self._unchanged)

    @cached_property
    def judged(self) -> FloatArray:
        """Calibrated log-probabilities (n, K) of each labelled text by a model and a calibration that did not see it:
        what risks and weights are found by."""
        labels = self._data.train.labels
        return np.log(cross_fitted_proba(self.held_out[:, None], labels, towards=self._unchanged))

    @property
    def _unchanged(self) -> Calibration:
        return Calibration(weights=(1.0,), bias=(0.0,) * self.targets.shape[1])

    def learn(self, taught: Taught) -> tuple[FloatArray, FloatArray]:
        """Take ``taught`` for what there is to learn beside the labelled texts. Returns probabilities (n, K) of the
        labelled texts, each by a model that did not see it: before, and after."""
        before, earlier = np.exp(self.held_out), self.taught
        self._take(taught)
        self._earlier = earlier
        return before, np.exp(self.held_out)

    def unlearn(self) -> None:
        """Go back to what there was to learn before the last lessons."""
        self._take(self._earlier)

    def _take(self, taught: Taught) -> None:
        self.taught = taught
        for name in ("model", "voter", "held_out", "calibration", "judged"):
            self.__dict__.pop(name, None)

    def of(self, taught: Taught) -> DomainModel:
        """A model of the labelled texts and ``taught``, which is not kept."""
        return Student(self.make(), taught).fit(self._data.train.texts, self.targets)

    def trained(self, parameters: Sequence[float], proximal: float) -> FloatArray:
        """Parameters after some local steps from ``parameters``, or from the start where there are none; none of a
        kind that has none."""
        model = self.make()
        if not isinstance(model, Averageable):
            return np.zeros(0)
        if parameters:
            model.parameters = self._fitting(model, parameters)
        return model.trained(self._data.train.texts, self.targets, n_steps=LOCAL_STEPS, proximal=proximal)

    def with_parameters(self, parameters: Sequence[float]) -> DomainModel:
        """A model with averaged parameters; the client's own where there are none for its kind."""
        model = self.make()
        if not parameters or not isinstance(model, Averageable):
            return self.own
        model.parameters = self._fitting(model, parameters)
        return model

    def _fitting(self, model: Averageable, parameters: Sequence[float]) -> FloatArray:
        flat = np.array(parameters)
        if flat.shape != model.parameters.shape:
            raise RunError(
                f"{len(flat)} parameters for a domain model of kind {self.kind!r} that has {model.parameters.size}: do "
                "all clients have the same labels and encoder?"
            )
        return flat
