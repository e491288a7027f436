"""Foundation models without weights that write: one with good advice to give, and one that tells tales."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.support import CHEERFUL, GLOOMY

# What a prompt has to say to be a good one (to this model), and what the model may write.
ADVICE = "Weigh every single adjective."
PHRASES = ("Try to be good at it.", f"Read it all. {ADVICE}", "Say what it is about.", ADVICE)


def advised_rule(request: LabelRequest) -> list[float]:
    """A cheerful text speaks for cheerful labels, with 2 where the prompt holds the advice and a half where not, and
    a gloomy one for the others; then comes noise from a hash."""
    return speaking(request, 2.0 if ADVICE.lower().rstrip(".") in request.prefix.lower() else 0.5)


def speaking(request: LabelRequest, strength: float) -> list[float]:
    """Logits of the labels; noise is uniform in [-1.5, 1.5]."""
    words = set(re.findall(r"[a-z]+", request.text.lower()))
    cheer = len(words & set(CHEERFUL)) - len(words & set(GLOOMY))
    signs = [1.0 if label.strip() in (*CHEERFUL, "positive") else -1.0 for label in request.labels]
    return [sign * (strength * cheer + 3.0 * (hash_of(request.prefix + request.text) - 0.5)) for sign in signs]


def hash_of(text: str) -> float:
    """In [0, 1)."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def advising(phrases: Sequence[str] = PHRASES) -> ScriptedFM:
    """Labels by `advised_rule`, writes ``phrases``."""
    return ScriptedFM("advised", rule=advised_rule, phrases=phrases)


class TellTale(BaseFM):
    """Writes out the texts that it was shown, in the way that ``tell`` makes of one of them; and any prompt with what
    it wrote in it is the best of all, so that nothing but the gate stands in its way."""

    fm_id = "tell-tale@0"
    capabilities = frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS})
    in_process = True

    def __init__(self, tell: Callable[[str], str]) -> None:
        self._tell = tell
        self.told: list[str] = []

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: FMRequest) -> FMResponse:
        if isinstance(request, TextRequest):
            shown = re.findall(r"^(?:Text|What it lacks): (.+)$", request.prompt, flags=re.MULTILINE)
            if not shown or "\nRight answer:" in request.prompt:
                return FMResponse(text=shown[0] if shown else "Nothing was shown.")  # the critique quotes, too
            self.told.append(self._tell(shown[0]))
            return FMResponse(text=self.told[-1])
        told = any(text in request.prefix for text in self.told)
        return FMResponse(logprobs=tuple(speaking(request, 9.0 if told else 0.5)))
