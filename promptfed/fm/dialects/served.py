"""``promptfed serve`` of an embedded model: items travel as their parts, answers come back as they were computed.

See `promptfed.fm.completions` for the schema.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from promptfed.errors import FMError
from promptfed.fm.dialects.base import MALFORMED, Dialect, parsed
from promptfed.fm.endpoint import UnansweredError
from promptfed.types import FMRequest, FMResponse, LabelRequest, SoftPrompt, TextRequest

_RESPONSE = TypeAdapter(FMResponse)


class _Completion(BaseModel):
    system_fingerprint: str
    choices: list[dict[str, Any]]


class ServedDialect(Dialect):
    """The server computes one batch at a time: a second request keeps it busy, more would only wait there and run into
    the timeout. What one request carries is bounded so that a slow machine answers well within it too."""

    max_requests = 2
    max_items = 128
    max_texts = 64

    def alike(self, request: FMRequest) -> Hashable:
        if isinstance(request, LabelRequest):
            return request.prefix, request.suffix, request.labels, request.absolute, request.soft
        return replace(request, seed=0)

    def size(self, request: FMRequest) -> int:
        # Texts from one prompt are bounded in number: what they share is sent once.
        return len(request.text) if isinstance(request, LabelRequest) else self.max_characters // self.max_texts

    async def ask(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        body = {"model": self.model, **_parts(requests)}
        completion = parsed(_Completion, await self.endpoint.post("/completions", body))
        if len(completion.choices) != len(requests):
            raise UnansweredError(ValueError("an answer an item is expected"))
        if completion.system_fingerprint != self.fm_id:
            raise FMError(
                f"the model behind {self.endpoint.url} is no longer {self.fm_id}: start again, or serve that one"
            )
        return [_answer(request, choice) for request, choice in zip(requests, completion.choices, strict=True)]


def _parts(requests: Sequence[FMRequest]) -> dict[str, Any]:
    """The fields of the HTTP request that carries these, which are alike."""
    first = requests[0]
    if isinstance(first, LabelRequest):
        shared = {"prefix": first.prefix, "suffix": first.suffix, "labels": first.labels, "absolute": first.absolute}
        texts = [r.text for r in requests if isinstance(r, LabelRequest)]
        return {"prompt": texts, "max_tokens": 1, "promptfed": shared | _soft(first.soft)}
    return {
        "prompt": first.prompt,
        "n": len(requests),
        "max_tokens": first.max_tokens,
        "temperature": first.temperature,
        "top_p": first.top_p,
        "stop": list(first.stop),
        "promptfed": {"seeds": [r.seed for r in requests if isinstance(r, TextRequest)]} | _soft(first.soft),
    }


def _soft(soft: SoftPrompt | None) -> dict[str, Any]:
    if soft is None:
        return {}
    return {"soft": {"n": soft.n, "hidden": soft.hidden, "data": base64.b64encode(soft.data).decode()}}


def _answer(request: FMRequest, choice: dict[str, Any]) -> FMResponse:
    """The answer in a choice, if it is whole: as many finite numbers as labels, or a text."""
    try:
        answer = _RESPONSE.validate_python(choice.get("promptfed"))
    except ValidationError:
        return MALFORMED
    if answer.error is not None:
        return FMResponse(error="the server could not answer this item")
    n_labels = len(request.labels) if isinstance(request, LabelRequest) else 0
    counts = (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens, answer.usd)
    whole = (
        len(answer.logprobs or ()) == n_labels
        and (answer.text is None) == isinstance(request, LabelRequest)
        and all(of is None or len(of) == n_labels for of in (answer.label_tokens, answer.censored))
        and all(map(math.isfinite, (*(answer.logprobs or ()), *counts)))
        and min(counts) >= 0
    )
    return answer if whole else MALFORMED
