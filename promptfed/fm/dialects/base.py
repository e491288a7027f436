"""What all dialects share: requests that go together, answers that are whole, what a request used."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from promptfed.fm.endpoint import Endpoint, UnansweredError
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, SoftSpace

M = TypeVar("M", bound=BaseModel)
MALFORMED = FMResponse(error="malformed answer")


class Dialect(ABC):
    """One kind of server. ``ask`` gets requests that `group` put together and gives an answer each."""

    max_requests = 4  # on their way at once
    max_items = 64  # that one request carries
    max_characters = 65_536
    soft_space: SoftSpace | None = None

    def __init__(self, endpoint: Endpoint, model: str, fm_id: str, capabilities: frozenset[Capability]) -> None:
        self.endpoint, self.model, self.fm_id, self.capabilities = endpoint, model, fm_id, capabilities

    @abstractmethod
    def alike(self, request: FMRequest) -> Hashable:
        """What requests must have in common to go together; None for one that goes alone."""

    @abstractmethod
    async def ask(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        """The answers to requests that are alike. Raises `UnansweredError` if there is none to any of them."""

    def groups(self, requests: Sequence[FMRequest]) -> Iterator[list[int]]:
        """Indices of requests that go together, in order, within what one request may carry."""
        by_kind: dict[Hashable, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            key = self.alike(request)
            by_kind[("alone", i) if key is None else (type(request), key)].append(i)
        for items in by_kind.values():
            group: list[int] = []
            n_characters = 0
            for i in items:
                size = self.size(requests[i])
                if group and (len(group) == self.max_items or n_characters + size > self.max_characters):
                    yield group
                    group, n_characters = [], 0
                group.append(i)
                n_characters += size
            yield group

    def size(self, request: FMRequest) -> int:
        """Characters that it adds to a group."""
        return len(whole_prompt(request))


class TokenUsage(BaseModel):
    """OpenAI's ``usage``."""

    class Details(BaseModel):
        cached_tokens: int | None = None

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None

    def shares(self, n: int) -> list[FMResponse]:
        """``n`` answers that hold token counts only: equal parts, since the server tells the sum alone."""
        cached = (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0

        def part(total: int, i: int) -> int:
            return max(total, 0) // n + (i < max(total, 0) % n)

        return [
            FMResponse(
                prompt_tokens=part(self.prompt_tokens, i),
                completion_tokens=part(self.completion_tokens, i),
                cached_tokens=part(cached, i),
            )
            for i in range(n)
        ]


def whole_prompt(request: FMRequest) -> str:
    """What the model reads."""
    return request.prefix + request.text + request.suffix if isinstance(request, LabelRequest) else request.prompt


def parsed(kind: type[M], body: Any) -> M:
    """``body`` checked against a model. Raises `UnansweredError` if it is something else."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise UnansweredError(error) from None


def scored(
    request: LabelRequest,
    logprobs: Sequence[float],
    used: FMResponse,
    *,
    censored: Sequence[bool] | None = None,
    label_tokens: Sequence[int] | None = None,
) -> FMResponse:
    """``used`` with log-probabilities over the vocabulary, normalised over the labels unless asked for as they are."""
    if not all(map(math.isfinite, logprobs)):
        return MALFORMED
    shift = 0.0 if request.absolute else float(np.logaddexp.reduce(logprobs))
    return replace(
        used,
        logprobs=tuple(float(lp) - shift for lp in logprobs),
        censored=tuple(censored) if censored is not None and any(censored) else None,
        label_tokens=tuple(label_tokens) if label_tokens is not None and max(label_tokens) > 1 else None,
    )


def among(request: LabelRequest, top: Mapping[str, float], used: FMResponse, *, folded: bool = False) -> FMResponse:
    """An answer from the most probable next tokens: ``top`` maps each to its log-probability.

    A token speaks for the label that begins with it, if it is one only. A label without such a token is censored: no
    more is known than that it is at most as probable as the least of them, and as what they leave over. ``folded``
    compares without white space and, if the labels still differ, without regard to capitals, as chat models answer.
    With no label among them, all are censored: to ask again would tell no more.
    """
    labels, tokens = list(request.labels), list(top)
    if folded:
        labels, tokens = [label.strip() for label in labels], [token.strip() for token in tokens]
        if len({label.casefold() for label in labels}) == len(labels):
            labels, tokens = [label.casefold() for label in labels], [token.casefold() for token in tokens]
    # More than certain is no log-probability; a little more is how numbers are rounded.
    if not top or not all(-math.inf < logprob < 0.01 for logprob in top.values()):
        return MALFORMED
    found: list[list[float]] = [[] for _ in labels]
    left_over = max(1.0 - math.fsum(map(math.exp, top.values())), 1e-9)
    bound = [min(min(top.values()), math.log(left_over))] * len(labels)
    for token, logprob in zip(tokens, top.values(), strict=True):
        meant = [k for k, label in enumerate(labels) if token and label.startswith(token)]
        if len(meant) == 1:
            found[meant[0]].append(logprob)
        for k in meant[1:] and meant:
            bound[k] = max(bound[k], logprob)
    logprobs = [float(np.logaddexp.reduce(lps)) if lps else b for lps, b in zip(found, bound, strict=True)]
    return scored(request, logprobs, used, censored=[not lps for lps in found])
