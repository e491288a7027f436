"""What every foundation model shares: label scoring on top of `complete`, sync and async."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from promptfed.errors import CapabilityError, ConfigError
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FMRequest, FMResponse, SoftSpace, satisfies

T = TypeVar("T")

# What to use instead of a model that lacks it.
_EXACT = "The embedded engine (embedded:NAME), promptfed serve and a vLLM server have it"
_HINTS = {
    Capability.TEXT: "Name a model that writes as fm.proposer",
    Capability.LABEL_CHOICE: "Name a model that reads and answers, such as embedded:NAME",
    Capability.TOP_LOGPROBS: f"{_EXACT}, as do hosted APIs that return top_logprobs; or choose another method",
    Capability.LABEL_LOGPROBS: f"{_EXACT}; or choose a method that makes do with top_logprobs (promptfed methods)",
    Capability.PROMPT_LOGPROBS: f"{_EXACT}; or choose label words of one token",
    Capability.PROMPT_EMBEDS: "The embedded engine has it, and a vLLM server started with --enable-prompt-embeds whose "
    "model's weights are on this machine too; or choose a method that tunes text (promptfed methods)",
}


class BaseFM(ABC):
    """A foundation model. Subclasses give ``fm_id``, ``capabilities`` and `complete`."""

    @property
    def in_process(self) -> bool:
        """Whether what it is asked stays in this process. Only a model that computes here may say so."""
        return False

    @property
    @abstractmethod
    def fm_id(self) -> str: ...

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]: ...

    @property
    def soft_space(self) -> SoftSpace | None:
        """Where soft prompts of this model live; None for a model that takes none."""
        return None

    @abstractmethod
    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]: ...

    @property
    def is_priced(self) -> bool:
        """Whether it is known what its answers cost."""
        return self.in_process

    def most_usd(self, _: Sequence[FMRequest]) -> float:
        """What these requests can cost at most, in USD."""
        return 0.0

    def require(self, capability: Capability, wanted_by: str) -> None:
        """Raise `CapabilityError` if this model can't do what ``wanted_by`` needs."""
        if not satisfies(self.capabilities, capability):
            raise CapabilityError(lacking(wanted_by, capability, self.fm_id, self.capabilities))

    async def ascore_labels(
        self, prompt: PromptTemplate | str, texts: Sequence[str], labels: Sequence[str] | None = None
    ) -> np.ma.MaskedArray[Any, Any]:
        """Log-probabilities (n, n_labels), float64, normalised over the labels; failed rows are masked.

        ``prompt`` is a template, or raw text with one ``{text}`` slot together with ``labels``, its label words.
        """
        self.require(Capability.LABEL_CHOICE, "score_labels")
        if isinstance(prompt, str):
            prompt = PromptTemplate(text=prompt, words=tuple(labels or ()))
        if not prompt.words:
            raise ConfigError("score_labels needs label words; a prompt without them is for write_answers")
        answers = await self.complete(prompt.requests(texts))
        return prompt.label_scores(answers)

    def score_labels(
        self, prompt: PromptTemplate | str, texts: Sequence[str], labels: Sequence[str] | None = None
    ) -> np.ma.MaskedArray[Any, Any]:
        """`ascore_labels`, blocking. Works inside a running event loop (a notebook) too."""
        return run_sync(self.ascore_labels(prompt, texts, labels))

    async def awrite_answers(self, prompt: PromptTemplate, texts: Sequence[str]) -> list[str | None]:
        """What this model answers to each text behind ``prompt``, which has no label words; None where it failed."""
        self.require(Capability.TEXT, "write_answers")
        if prompt.words:
            raise ConfigError("write_answers needs a prompt without label words; one with them is for score_labels")
        return prompt.answers(await self.complete(prompt.requests(texts)))

    def write_answers(self, prompt: PromptTemplate, texts: Sequence[str]) -> list[str | None]:
        """`awrite_answers`, blocking."""
        return run_sync(self.awrite_answers(prompt, texts))


class WrappedFM(BaseFM):
    """A foundation model around another one, which it passes for."""

    def __init__(self, inner: BaseFM) -> None:
        self._inner = inner

    @property
    def fm_id(self) -> str:
        return self._inner.fm_id

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._inner.capabilities

    @property
    def in_process(self) -> bool:
        return self._inner.in_process

    @property
    def is_priced(self) -> bool:
        return self._inner.is_priced

    @property
    def soft_space(self) -> SoftSpace | None:
        return self._inner.soft_space

    def most_usd(self, requests: Sequence[FMRequest]) -> float:
        return self._inner.most_usd(requests)


def lacking(wanted_by: str, wanted: Capability, fm: str, offered: Iterable[Capability]) -> str:
    """What to say where a model can't do what is wanted, with what to use instead."""
    have = ", ".join(sorted(offered)) or "nothing"
    return f"{wanted_by} needs {wanted} from the FM; {fm} offers {have}. {_HINTS[wanted]}"


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from sync code, in a thread of its own where a loop already runs here."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(asyncio.run(coroutine))
        except BaseException as error:  # noqa: BLE001  (handed to the caller's thread)
            errors.append(error)

    thread = threading.Thread(target=work, name="promptfed-sync")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
