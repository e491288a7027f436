"""A foundation model without weights that takes soft prompts, with one that is best by construction."""

from __future__ import annotations

import hashlib

import numpy as np

from promptfed.fm.scripted import ScriptedFM
from promptfed.prompts.soft import Projection, vectors_of
from promptfed.types import FloatArray, LabelRequest, SoftPrompt, SoftSpace
from tests.support import CHEERFUL, GLOOMY

SPACE = SoftSpace(hidden=8, std=0.125)


class Planted:
    """The label of a text of `tests.support` shows with ``4 / (1 + r^2)`` logits, r being how far the soft prompt is
    from ``target``, in units of the embeddings' standard deviation, and with 0.8 where there is none. What else a text
    says is noise of standard deviation 1, another for each text and prompt before it."""

    def __init__(self, projection: Projection, seed: int = 0) -> None:
        direction = np.random.default_rng([seed, 99]).standard_normal(projection.dimension)
        # At 2 standard deviations of the embeddings from the start.
        self.z = 2.0 * np.sqrt(projection.dimension) * direction / np.linalg.norm(direction)
        self.target: FloatArray = projection.vectors(self.z)

    def distance(self, soft: SoftPrompt) -> float:
        return float(np.sqrt(np.mean((vectors_of(soft) - self.target) ** 2)) / SPACE.std)

    def rule(self, request: LabelRequest) -> list[float]:
        strength = 4.0 / (1.0 + self.distance(request.soft) ** 2) if request.soft else 0.8
        words = request.text.lower()
        is_good = any(w in words for w in CHEERFUL) - any(w in words for w in GLOOMY)
        digest = hashlib.sha256(f"{request.prefix}|{request.text}".encode()).digest()
        noise = sum(digest[:12]) / 255.0 - 6.0  # of twelve uniform numbers: variance 1
        signs = {" negative": -1.0, " positive": 1.0}
        return [signs.get(label, 0.0) * (strength * is_good + noise) / 2.0 for label in request.labels]

    def fm(self) -> ScriptedFM:
        return ScriptedFM("planted", rule=self.rule, soft_space=SPACE)
