"""A foundation model without weights, for tests and for trying a configuration in a second.

It behaves like an in-context learner that a reader can follow: the score of a label is how many of the text's words
also stand in the prompt's exemplars of that label, less what the whole prompt is biased by, plus a little noise that
depends on (prompt, text) alone. A prompt whose exemplars use the words of the task is therefore better, a prompt may
be biased towards a label (so calibration matters), and the best prompt can be known by construction.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from promptfed.fm.base import BaseFM
from promptfed.prompts.soft import check_soft
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, SoftSpace, TextRequest

Rule = Callable[[LabelRequest], Sequence[float]]
_WORD = re.compile(r"[a-z0-9']+")


class ScriptedFM(BaseFM):
    """``scripted:NAME``. ``rule`` maps a label request to logits; ``phrases`` are what it writes, in seeded order.

    With a ``soft_space`` it takes soft prompts: what one is worth is the rule's affair, which sees ``request.soft``.
    """

    def __init__(
        self,
        name: str = "overlap",
        *,
        rule: Rule | None = None,
        phrases: Sequence[str] = ("good and nice", "bad and poor", "a fine day", "a sad day"),
        capabilities: frozenset[Capability] = frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS}),
        soft_space: SoftSpace | None = None,
    ) -> None:
        self._name = name
        self._rule = rule or overlap_rule
        self._phrases = tuple(phrases)
        self._capabilities = capabilities | ({Capability.PROMPT_EMBEDS} if soft_space else frozenset())
        self._soft_space = soft_space

    @property
    def fm_id(self) -> str:
        return f"scripted:{self._name}@0"

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._capabilities

    @property
    def soft_space(self) -> SoftSpace | None:
        return self._soft_space

    @property
    def in_process(self) -> bool:
        return True

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        """Raises `CapabilityError` for a soft prompt if it takes none, `ConfigError` for one of another width."""
        for soft in {request.soft for request in requests if request.soft is not None}:
            self.require(Capability.PROMPT_EMBEDS, "a soft prompt")
            check_soft(soft, self._soft_space.hidden if self._soft_space else 0)
        return [self._answer(request) for request in requests]

    def _answer(self, request: FMRequest) -> FMResponse:
        if isinstance(request, TextRequest):
            rng = np.random.default_rng([request.seed, *_hash(request.prompt)])
            text = str(rng.choice(self._phrases))
            return FMResponse(text=text, prompt_tokens=len(request.prompt.split()), completion_tokens=len(text.split()))
        logits = np.asarray(self._rule(request), dtype=np.float64)
        logp = logits - np.logaddexp.reduce(logits)
        n_prompt = len(request.prefix.split()) + len(request.text.split())
        return FMResponse(logprobs=tuple(logp.tolist()), prompt_tokens=n_prompt, completion_tokens=1)


def overlap_rule(request: LabelRequest) -> list[float]:
    """Logits as the module docstring tells: 2 per shared word, a bias and noise from hashes."""
    words = set(_WORD.findall(request.text.lower()))
    blocks = request.prefix.split("\n\n")
    logits = []
    for label in request.labels:
        exemplars = " ".join(b for b in blocks if b.rstrip().endswith(label.strip())).lower()
        shared = len(words & set(_WORD.findall(exemplars)))
        logits.append(
            2.0 * shared + hash_noise(request.prefix, label) + 0.5 * hash_noise(request.prefix, request.text, label)
        )
    return logits


def _hash(*parts: str) -> list[int]:
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "big") for i in (0, 4)]


def hash_noise(*parts: str) -> float:
    """A standard normal number that depends on ``parts`` alone (Box-Muller on two hash words)."""
    a, b = ((h + 1) / (2**32 + 1) for h in _hash(*parts))
    return math.sqrt(-2 * math.log(a)) * math.cos(2 * math.pi * b)
