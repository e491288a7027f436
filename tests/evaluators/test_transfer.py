"""A prompt at another model: the calibration does not travel, its label-free remaking does."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators.transfer import ORIGIN, RECALIBRATED, STORED, transfer
from promptfed.errors import CapabilityError, ConfigError
from promptfed.fm.scripted import ScriptedFM
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.soft import soft_prompt
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, LabelRequest
from tests.support import LABELS, FailingFM

P = PromptTemplate(text="Text: {text}\nLabel:", words=LABELS)
PROMPT = PromptSet(labels=LABELS, prompts=(P,), weights=(1.0,), bias=(0.0, 0.0))
TEXTS = tuple(f"{'good' if i % 2 else 'bad'} {i}" for i in range(20))
LABELLED = np.arange(20) % 2


def model(shift: float) -> ScriptedFM:
    """Right, but for a bias of ``shift`` towards positive."""

    def rule(request: LabelRequest) -> list[float]:
        return [0.0, (1.0 if "good" in request.text else -1.0) + shift]

    return ScriptedFM(f"shift{shift:g}", rule=rule)


def test_a_biased_model_is_mended_without_labels_by_hand() -> None:
    got = transfer(PROMPT, TEXTS, LABELLED, model(5.0), model(0.0))

    assert got.accuracy == {ORIGIN: 1.0, STORED: 0.5, RECALIBRATED: 1.0}
    assert got.n == 20
    assert got.n_failed == {"scripted:shift5@0": 0, "scripted:shift0@0": 0}
    lost, mended = got.differences[STORED, ORIGIN], got.differences[RECALIBRATED, STORED]
    assert (lost.difference, mended.difference) == (-0.5, 0.5)
    assert lost.ci95[1] < 0 < mended.ci95[0]
    assert got.differences[RECALIBRATED, ORIGIN].ci95 == (0.0, 0.0)


def test_without_the_model_that_it_was_tuned_on_there_is_nothing_beside_it() -> None:
    got = transfer(PROMPT, TEXTS, LABELLED, model(5.0))

    assert set(got.accuracy) == {STORED, RECALIBRATED}
    assert set(got.differences) == {(RECALIBRATED, STORED)}


def test_a_text_that_failed_is_wrong() -> None:
    got = transfer(PROMPT, TEXTS, LABELLED, FailingFM())

    assert got.accuracy == {STORED: 0.0, RECALIBRATED: 0.0}
    assert got.n_failed == {"failing@0": 20}


def test_a_soft_prompt_does_not_travel() -> None:
    soft = PromptTemplate(text="{text}", words=LABELS, soft=soft_prompt(np.ones((2, 4))))
    prompt = PromptSet(labels=LABELS, prompts=(soft,), weights=(1.0,), bias=(0.0, 0.0))

    with pytest.raises(ConfigError, match="belong to the embeddings of the model"):
        transfer(prompt, TEXTS, LABELLED, model(0.0))


def test_a_model_that_only_writes_is_refused() -> None:
    with pytest.raises(CapabilityError, match="promptfed transfer needs label_choice"):
        transfer(PROMPT, TEXTS, LABELLED, ScriptedFM(capabilities=frozenset({Capability.TEXT})))
