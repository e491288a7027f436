"""A server with OpenAI's ``/completions`` that returns the most probable tokens: labels among them are scored, the
others are censored (`promptfed.fm.dialects.base.among`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field

from promptfed.errors import FMError
from promptfed.fm.dialects.base import MALFORMED, Dialect, TokenUsage, among, parsed, whole_prompt
from promptfed.fm.endpoint import Endpoint, UnansweredError
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, SoftPrompt, TextRequest


class _Logprobs(BaseModel):
    top_logprobs: list[dict[str, float] | None] = []


class Choice(BaseModel):
    """One answer; fields that only vLLM gives are None elsewhere."""

    text: str | None = None
    logprobs: _Logprobs | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None

    @property
    def top(self) -> dict[str, float]:
        """The most probable tokens of the first place, with their log-probabilities."""
        tops = self.logprobs.top_logprobs if self.logprobs else []
        return (tops[0] if tops else None) or {}

    def logprob_of(self, token: int) -> float | None:
        """Of a token in the first place, by its number (``return_tokens_as_token_ids``)."""
        return self.top.get(f"token_id:{token}")


class Completion(BaseModel):
    """The body of an answer."""

    choices: list[Choice] = Field(min_length=1)
    usage: TokenUsage = Field(default_factory=TokenUsage)
    system_fingerprint: str | None = None


class CompletionsDialect(Dialect):
    """``top`` is how many tokens the server returns at most. ``fingerprint`` is the server's, where nothing else tells
    its model: a change of it ends the run."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        fm_id: str,
        capabilities: frozenset[Capability],
        *,
        top: int = 5,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(endpoint, model, fm_id, capabilities)
        self._top, self._fingerprint = top, fingerprint

    def alike(self, request: FMRequest) -> Hashable:
        if isinstance(request, LabelRequest):
            return request.labels, request.absolute, request.soft
        return replace(request, prompt="", seed=request.seed if request.temperature > 0 else 0)

    async def ask(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        if isinstance(requests[0], LabelRequest):
            return await self.score([r for r in requests if isinstance(r, LabelRequest)])
        return await self._write([r for r in requests if isinstance(r, TextRequest)])

    async def score(self, requests: list[LabelRequest]) -> list[FMResponse]:
        """The answers to label requests that are alike."""
        fields = {"prompt": [whole_prompt(r) for r in requests], "logprobs": self._top}
        completion = await self.complete(fields, len(requests))
        shares = completion.usage.shares(len(requests))
        return [
            among(request, choice.top, used)
            for request, choice, used in zip(requests, completion.choices, shares, strict=True)
        ]

    async def _write(self, requests: list[TextRequest]) -> list[FMResponse]:
        first = requests[0]
        completion = await self.complete(
            self.prompts([r.prompt for r in requests], first.soft)
            | {"max_tokens": first.max_tokens, "temperature": first.temperature, "top_p": first.top_p}
            | {"seed": first.seed, "stop": list(first.stop)},
            len(requests),
        )
        shares = completion.usage.shares(len(requests))
        return [
            replace(used, text=choice.text) if choice.text is not None else MALFORMED
            for choice, used in zip(completion.choices, shares, strict=True)
        ]

    def prompts(self, prompts: list[str], soft: SoftPrompt | None) -> dict[str, Any]:
        """The fields that carry the prompts."""
        if soft is not None:
            raise FMError(f"{self.fm_id} takes no soft prompts")  # its capabilities say so before
        return {"prompt": prompts}

    async def complete(self, fields: dict[str, Any], n: int) -> Completion:
        """Ask for ``n`` answers: of one token and greedy, unless ``fields`` say otherwise."""
        body = {"model": self.model, "max_tokens": 1, "temperature": 0, **fields}
        completion = parsed(Completion, await self.endpoint.post("/completions", body))
        if len(completion.choices) != n:
            raise UnansweredError(ValueError("an answer an item is expected"))
        if self._fingerprint is not None and completion.system_fingerprint != self._fingerprint:
            raise FMError(
                f"the server behind {self.endpoint.url} is no longer that of {self.fm_id}: start again, or serve it"
            )
        return completion
