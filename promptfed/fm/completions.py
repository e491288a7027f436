"""OpenAI's ``/v1/completions`` as `promptfed serve` speaks it: one prompt or a list, and one field more, all optional.

    "promptfed": {
        "prefix": "...", "suffix": "...",    shared by all prompts: what is read is prefix + prompt + suffix. The prefix
                                             is computed once; a prompt too long for the model is cut, they are not
        "labels": [" good", " very bad"],    score these whole continuations instead of writing
        "absolute": true,                    do not normalise over the labels
        "soft": {"n", "hidden", "data"},     a soft prompt in front of it all; data in base64
        "seeds": [7, 3, ...]                 for writing: n of them, in place of seed, seed + 1, ...
    }

Every choice carries ``promptfed``, the `FMResponse` as it is: log-probabilities in the order of the labels, normalised
over them; token counts; ``error`` where the item failed. For a client that knows OpenAI's schema only, a scored
choice's text is its best label, and ``logprobs`` asks for ``top_logprobs`` with all labels in it.
"""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from promptfed.types import FMRequest, FMResponse, LabelRequest, SoftPrompt, TextRequest

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Extension(_Strict):
    """The field ``promptfed`` of a request."""

    prefix: str = ""
    suffix: str = ""
    labels: Annotated[tuple[str, ...], Field(min_length=1, max_length=1024)] | None = None
    absolute: bool = False
    soft: SoftPrompt | None = None
    seeds: tuple[Seed, ...] | None = None


class Completion(_Strict):
    """The body of a request. What would change an answer and is not offered may be sent with its neutral value."""

    model: str
    prompt: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=2048)]
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    stop: str | tuple[str, ...] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    promptfed: Extension = Extension()
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    stream: Literal[False] = False
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    user: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Completion:
        own = self.promptfed
        if own.labels is None and self.logprobs:
            raise ValueError("logprobs are of labels: send promptfed.labels")
        if own.labels is not None and (own.seeds is not None or self.n != 1):
            raise ValueError("labels are scored once: send neither n nor promptfed.seeds")
        if own.seeds is not None and len(own.seeds) != self.n:
            raise ValueError("promptfed.seeds needs n seeds")
        return self

    def requests(self) -> list[FMRequest]:
        """What the model is asked: a choice of the answer each."""
        own = self.promptfed
        prompts = (self.prompt,) if isinstance(self.prompt, str) else self.prompt
        if own.labels is not None:
            return [
                LabelRequest(
                    prefix=own.prefix,
                    text=prompt,
                    suffix=own.suffix,
                    labels=own.labels,
                    absolute=own.absolute,
                    soft=own.soft,
                )
                for prompt in prompts
            ]
        return [
            TextRequest(
                prompt=own.prefix + prompt + own.suffix,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=seed,
                stop=(self.stop,) if isinstance(self.stop, str) else self.stop or (),
                soft=own.soft,
            )
            for prompt in prompts
            for seed in own.seeds or range(self.seed, self.seed + self.n)
        ]

    def answer(self, fm_id: str, requests: list[FMRequest], answers: list[FMResponse]) -> dict[str, Any]:
        """The body that goes back, for the answers to `requests`. It never holds a number that is not finite."""
        n_prompt, n_written = sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": fm_id,
            "choices": [self._choice(i, *pair) for i, pair in enumerate(zip(requests, answers, strict=True))],
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_written,
                "total_tokens": n_prompt + n_written,
                "prompt_tokens_details": {"cached_tokens": sum(a.cached_tokens for a in answers)},
            },
        }

    def _choice(self, index: int, request: FMRequest, answer: FMResponse) -> dict[str, Any]:
        text, finish, logprobs = answer.text or "", "stop", None
        if not all(map(math.isfinite, answer.logprobs or ())):
            answer = FMResponse(error="the model gave a number that is not finite")
        if answer.error is not None:
            finish = "error"
        elif isinstance(request, TextRequest):
            finish = "length" if answer.completion_tokens >= request.max_tokens else "stop"
        elif answer.logprobs is not None:
            scores = dict(zip(request.labels, answer.logprobs, strict=True))
            text = max(scores, key=scores.__getitem__)
            if self.logprobs is not None:
                logprobs = {
                    "tokens": [text],
                    "token_logprobs": [scores[text]],
                    "top_logprobs": [scores],
                    "text_offset": [len(request.prefix + request.text + request.suffix)],
                }
        return {
            "index": index,
            "text": text,
            "finish_reason": finish,
            "logprobs": logprobs,
            "promptfed": asdict(answer),
        }


def model_name(fm_id: str) -> str:
    """What a client calls the model: ``NAME`` of ``KIND:NAME@DIGEST``."""
    return fm_id.partition(":")[2].rpartition("@")[0] or fm_id
