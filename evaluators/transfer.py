"""Whether a tuned prompt is worth anything at another foundation model, measured on labelled texts.

Label words are scored on another scale by another model, so a calibration does not travel as a prompt does. Measured
are the prompt with its stored pooled calibration, and with one that is made anew from the other model's scores of the
same texts without a label (`promptfed.prompts.calibration.prior`: batch calibration, Zhou et al., ICLR 2024, arXiv
2309.17249), beside the model that the prompt was tuned on, where that is at hand. Batch calibration takes the labels to
be about as frequent as each other in the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluators.compare import Comparison, compare
from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, moments, prior
from promptfed.types import Capability, FloatArray, IntArray

ORIGIN, STORED, RECALIBRATED = "origin", "stored", "recalibrated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Accuracy by what was measured (`ORIGIN`, `STORED`, `RECALIBRATED`), and differences (a, b) -> a - b in pairs on
    the same texts. A text that a model failed on is a wrong answer; ``n_failed`` counts them by model."""

    n: int
    accuracy: Mapping[str, float]
    differences: Mapping[tuple[str, str], Comparison]
    n_failed: Mapping[str, int]


def transfer(
    prompt: PromptSet, texts: Sequence[str], labels: IntArray, fm: BaseFM, origin: BaseFM | None = None
) -> Transfer:
    """Measure ``prompt`` at ``fm``, and at ``origin``, the model that it was tuned on. ``labels`` (n,) index
    ``prompt.labels``. One FM call a text, prompt and model. Raises `ConfigError` for soft prompts."""
    if any(p.soft is not None for p in prompt.prompts):
        raise ConfigError(
            "this is a soft prompt: its vectors belong to the embeddings of the model that it was tuned on and mean "
            "nothing to another; tune one there, or a discrete prompt, which is text"
        )
    right: dict[str, FloatArray] = {}
    failed: dict[str, int] = {}
    for model in (origin, fm):
        if model is None:
            continue
        model.require(Capability.LABEL_CHOICE, "promptfed transfer")
        masked = np.ma.stack([model.score_labels(p, texts) for p in prompt.prompts], axis=1)
        bad = np.asarray(np.ma.getmaskarray(masked).any(axis=(1, 2)))
        scores = np.asarray(masked.data)
        stored = prompt.pooled
        right[ORIGIN if model is origin else STORED] = _right(scores, bad, labels, stored)
        failed[model.fm_id] = int(bad.sum())
        if model is fm:
            right[RECALIBRATED] = _right(scores, bad, labels, prior(int((~bad).sum()), *moments(scores[~bad])))
    pairs = [(STORED, ORIGIN), (RECALIBRATED, ORIGIN), (RECALIBRATED, STORED)]
    return Transfer(
        n=len(labels),
        accuracy={name: float(values.mean()) for name, values in right.items()},
        differences={(a, b): compare({"": right[a]}, {"": right[b]}) for a, b in pairs if {a, b} <= right.keys()},
        n_failed=failed,
    )


def _right(scores: FloatArray, failed: npt.NDArray[np.bool_], labels: IntArray, calibration: Calibration) -> FloatArray:
    """1 where the answer is right (n,)."""
    said = calibration.predict_proba(scores).argmax(axis=1)
    return np.asarray((said == labels) & ~failed, dtype=np.float64)
