"""A foundation model behind an OpenAI-compatible endpoint, asked through the `openai` SDK.

What the server is and can do is found out by asking it (`promptfed.fm.probe`); each kind of server is asked in its own
dialect (`promptfed.fm.dialects`). Texts go to the server and nowhere else (`promptfed.fm.endpoint`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from promptfed.fm.base import BaseFM, run_sync
from promptfed.fm.endpoint import Endpoint, UnansweredError, parse_address
from promptfed.fm.probe import find_dialect
from promptfed.types import Capability, FMRequest, FMResponse, SoftSpace


class OpenAIFM(BaseFM):
    """``openai:URL#MODEL``, such as ``openai:http://127.0.0.1:8700/v1#smollm2-135m-instruct``.

    The API key comes from ``PROMPTFED_API_KEY``. ``fm_id`` carries the digest of the weights where the server tells it
    (``promptfed serve`` does), else the provider's fingerprint. ``timeout_s`` bounds each HTTP request; a request that
    fails is not repeated here, and its items are failed answers that name the HTTP status or the kind of exception.

    Raises `ConfigError` for a bad address or a key that the server refuses, `UnknownNameError` for a model that is
    not served, `CapabilityError` for a server that can't be asked for labels, `FMUnreachableError` where none answers.
    """

    def __init__(self, name: str, *, timeout_s: float = 180.0) -> None:
        url, model = parse_address(name)
        self._endpoint = Endpoint(url, timeout_s=timeout_s)
        self._dialect = run_sync(find_dialect(self._endpoint, model))
        self._endpoint.max_requests = self._dialect.max_requests

    @property
    def fm_id(self) -> str:
        return self._dialect.fm_id

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._dialect.capabilities

    @property
    def soft_space(self) -> SoftSpace | None:
        return self._dialect.soft_space

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        """Answer in as few HTTP requests as their limits allow. Raises `FMError` if the served model has changed."""
        groups = list(self._dialect.groups(requests))
        answers: dict[int, FMResponse] = {}
        parts = await asyncio.gather(*(self._ask([requests[i] for i in items]) for items in groups))
        for items, part in zip(groups, parts, strict=True):
            answers |= zip(items, part, strict=True)
        return [answers[i] for i in range(len(requests))]

    async def _ask(self, requests: list[FMRequest]) -> list[FMResponse]:
        try:
            return await self._dialect.ask(requests)
        except UnansweredError as error:
            if error.refused and len(requests) > 1:
                # One item may be at fault (too long, say): halve until it stands alone.
                half = len(requests) // 2
                return [*await self._ask(requests[:half]), *await self._ask(requests[half:])]
            failed = FMResponse(error=error.kind, outage=error.outage, retry_after_s=error.retry_after_s)
            return [failed] * len(requests)
