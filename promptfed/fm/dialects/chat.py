"""A hosted API with OpenAI's ``/chat/completions``: labels among the most probable first tokens where it tells them
(the others are censored), else the label that it chooses, bound to a JSON schema where it can be, else read out of
what it writes.

A chat model is told to answer with a label, since it would else begin with a sentence. A label's separator plays no
part, nor do capitals unless labels differ by them alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, Field

from promptfed.fm.dialects.base import MALFORMED, Dialect, TokenUsage, among, parsed, scored, whole_prompt
from promptfed.fm.endpoint import Endpoint
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest

# What stands for the label that was chosen where no probability is told. A convention: calibration scales it.
CHOSEN = 0.9
# Tokens for an answer in JSON or in words.
CHOICE_TOKENS = 64
How = Literal["logprobs", "schema", "words"]


class _Token(BaseModel):
    token: str
    logprob: float


class _Place(BaseModel):
    top_logprobs: list[_Token] = []


class _Logprobs(BaseModel):
    content: list[_Place] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    logprobs: _Logprobs | None = None

    @property
    def top(self) -> dict[str, float]:
        """The most probable tokens of the first place, with their log-probabilities."""
        places = (self.logprobs and self.logprobs.content) or []
        top: dict[str, float] = {}
        for token in places[0].top_logprobs if places else []:
            top[token.token] = max(token.logprob, top.get(token.token, -math.inf))
        return top


class Chat(BaseModel):
    """The body of an answer."""

    choices: list[_Choice] = Field(min_length=1)
    usage: TokenUsage = Field(default_factory=TokenUsage)
    model: str | None = None


class ChatDialect(Dialect):
    """``how`` labels are scored; ``top``: tokens that the server tells; ``limit``: its name for the most tokens."""

    max_requests = 8

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        fm_id: str,
        capabilities: frozenset[Capability],
        *,
        how: How,
        top: int = 20,
        limit: str = "max_tokens",
    ) -> None:
        super().__init__(endpoint, model, fm_id, capabilities)
        self._how, self._top, self._limit = how, top, limit

    def alike(self, _: FMRequest) -> Hashable:
        return None

    async def ask(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        (request,) = requests
        if isinstance(request, LabelRequest):
            return [await self._label(request)]
        said = await self._say(
            [{"role": "user", "content": request.prompt}],
            {self._limit: request.max_tokens, "temperature": request.temperature, "top_p": request.top_p}
            | {"seed": request.seed}
            | ({"stop": list(request.stop)} if request.stop else {}),
        )
        text = said.choices[0].message.content
        (used,) = said.usage.shares(1)
        return [replace(used, text=text) if text is not None else MALFORMED]

    async def _label(self, request: LabelRequest) -> FMResponse:
        labels = [label.strip() for label in request.labels]
        told = f"Answer with one of these and nothing else: {', '.join(labels)}"
        messages = [{"role": "system", "content": told}, {"role": "user", "content": whole_prompt(request)}]
        said = await self._say(messages, self._label_fields(labels))
        (used,) = said.usage.shares(1)
        choice = said.choices[0]
        if self._how == "logprobs":
            return among(request, choice.top, used, folded=True)
        text = choice.message.content or ""
        chosen = in_json(text, labels) if self._how == "schema" else _in_words(text, labels)
        if chosen is None:
            return replace(used, error="the answer names no label, or several")
        rest = math.log((1 - CHOSEN) / max(len(labels) - 1, 1))
        logprobs = [math.log(CHOSEN) if k == chosen else rest for k in range(len(labels))]
        return scored(request, logprobs, used, censored=[k != chosen for k in range(len(labels))])

    def _label_fields(self, labels: list[str]) -> dict[str, Any]:
        if self._how == "logprobs":
            return {self._limit: 1, "temperature": 0, "logprobs": True, "top_logprobs": self._top}
        if self._how == "words":
            return {self._limit: CHOICE_TOKENS}
        return {self._limit: CHOICE_TOKENS, "response_format": label_schema(labels)}

    async def _say(self, messages: list[dict[str, str]], fields: dict[str, Any]) -> Chat:
        body = {"model": self.model, "messages": messages, **fields}
        return parsed(Chat, await self.endpoint.post("/chat/completions", body))


def label_schema(labels: Sequence[str]) -> dict[str, Any]:
    """A ``response_format`` that lets through one of ``labels`` only."""
    schema = {
        "type": "object",
        "properties": {"label": {"type": "string", "enum": list(labels)}},
        "required": ["label"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "label", "strict": True, "schema": schema}}


def in_json(text: str, labels: Sequence[str]) -> int | None:
    """The label in an answer to `label_schema`."""
    try:
        said = json.loads(text)
    except ValueError:
        return None
    label = said.get("label") if isinstance(said, dict) else None
    return labels.index(label) if label in labels else None


def _in_words(text: str, labels: Sequence[str]) -> int | None:
    """The label that a text names, if it is one only; a label within a longer one that is named does not count."""
    pattern = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    exact = len({label.casefold() for label in labels}) < len(labels)
    named = re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", text, 0 if exact else re.IGNORECASE)
    meant = {
        k
        for k, label in enumerate(labels)
        for n in named
        if n == label or (not exact and n.casefold() == label.casefold())
    }
    return meant.pop() if len(meant) == 1 else None
