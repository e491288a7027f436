"""A foundation model behind an OpenAI-compatible endpoint, asked through the `openai` SDK.

It speaks to ``promptfed serve``: the server's model card names the weights and what they can be asked for, and one
``/v1/completions`` request carries many items that share a prompt. Items travel as their parts (prefix, text, suffix,
labels: see `promptfed.fm.completions`), so the answers are those that the same model gives in this process. A server
without such a card is refused. To speak to another kind, let `_card` tell it apart, and write what takes the place of
`_parts` and `_answer`.

The texts go to the server and nowhere else: not into logs, errors or exceptions. What the server says in an error
is not repeated either, since it may quote what it was sent.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
from pydantic import BaseModel, TypeAdapter, ValidationError

from promptfed.errors import CapabilityError, ConfigError, FMError, UnknownNameError
from promptfed.fm.base import BaseFM, run_sync
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest

# Not OPENAI_API_KEY: a key for one provider must not go to whatever address a configuration names.
KEY_VARIABLE = "PROMPTFED_API_KEY"
# What is on its way at once, over all callers of an event loop. The server computes one batch at a time: a second
# request keeps it busy, more would only wait there and run into the timeout.
MAX_REQUESTS = 2
# What one request carries at most, so that its answer comes well within the timeout from a slow machine too.
MAX_LABEL_ITEMS = 128
MAX_TEXT_ITEMS = 64
MAX_CHARACTERS = 65_536
CONNECT_S, CARD_S = 5.0, 10.0

_ADDRESS = re.compile(r"(?P<model>.+?)@(?P<url>https?://\S+)")
_RESPONSE = TypeAdapter(FMResponse)
_Home = tuple[openai.AsyncOpenAI, asyncio.Semaphore, AsyncGenerator[None]]


class _Card(BaseModel):
    """What ``promptfed serve`` says of its model."""

    fm_id: str
    capabilities: list[str]


class _Model(BaseModel):
    id: str
    promptfed: _Card | None = None


class _Models(BaseModel):
    data: list[_Model]


class _Completion(BaseModel):
    system_fingerprint: str
    choices: list[dict[str, Any]]


class OpenAIFM(BaseFM):
    """``openai:MODEL@URL``, such as ``openai:smollm2-135m-instruct@http://127.0.0.1:8700/v1``.

    The API key comes from ``PROMPTFED_API_KEY``. ``fm_id`` is the served model's own, digest of the weights included.
    ``timeout_s`` bounds each HTTP request; a request that fails is not repeated here, and its items
    are failed answers that name the HTTP status or the kind of exception.

    Raises `ConfigError` for a bad address or a key that the server refuses, `UnknownNameError` for a model that is
    not served, `CapabilityError` for a server that is not ``promptfed serve``, and `FMError` where no server answers.
    """

    def __init__(self, name: str, *, timeout_s: float = 180.0) -> None:
        self._model, self._url = _parse(name)
        self._key = os.environ.get(KEY_VARIABLE, "").strip() or None
        self._timeout_s = timeout_s
        self._tls = httpx2.create_ssl_context()  # takes longer to make than a client
        self._homes: dict[asyncio.AbstractEventLoop, _Home] = {}
        card = run_sync(self._card())
        self._fm_id = card.fm_id
        self._capabilities = frozenset(c for c in Capability if c.value in card.capabilities)

    @property
    def fm_id(self) -> str:
        return self._fm_id

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._capabilities

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        """Answer in as few HTTP requests as their limits allow. Raises `FMError` if the served model has changed."""
        client, turns, _ = await self._home()

        async def ask(items: list[int]) -> list[FMResponse]:
            async with turns:
                return await self._ask(client, [requests[i] for i in items])

        calls = list(_calls(requests))
        answers: dict[int, FMResponse] = {}
        for items, part in zip(calls, await asyncio.gather(*map(ask, calls)), strict=True):
            answers |= zip(items, part, strict=True)
        return [answers[i] for i in range(len(requests))]

    async def _ask(self, client: openai.AsyncOpenAI, requests: list[FMRequest]) -> list[FMResponse]:
        try:
            async with asyncio.timeout(self._timeout_s):
                raw = await client.completions.with_raw_response.create(model=self._model, **_parts(requests))
            completion = _Completion.model_validate_json(raw.content)
            if len(completion.choices) != len(requests):
                raise ValueError("an answer an item is expected")
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            return [FMResponse(error=_kind(error), outage=_is_outage(error))] * len(requests)
        if completion.system_fingerprint != self._fm_id:
            raise FMError(f"the model behind {self._url} is no longer {self._fm_id}: start again, or serve that one")
        return [_answer(request, choice) for request, choice in zip(requests, completion.choices, strict=True)]

    async def _card(self) -> _Card:
        client, _, _ = await self._home()
        try:
            async with asyncio.timeout(min(self._timeout_s, CARD_S)):
                raw = await client.models.with_raw_response.list()
            models = _Models.model_validate_json(raw.content).data
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            said = "refuses this API key" if self._key else "asks for an API key"
            raise ConfigError(f"{self._url} {said} ({_kind(error)}); set {KEY_VARIABLE} to the server's") from None
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            raise FMError(
                f"no OpenAI-compatible server answers at {self._url} ({_kind(error)}). "
                f"To start one: promptfed serve embedded:{self._model} --port {urlsplit(self._url).port or 8700}"
            ) from None
        found = next((model for model in models if model.id == self._model), None)
        if found is None:
            raise UnknownNameError(f"model at {self._url}", self._model, [model.id for model in models])
        if found.promptfed is None:
            raise CapabilityError(
                f"{self._url} is not a `promptfed serve`: its model card does not say which weights it has and that it "
                "scores whole labels. This release scores labels over promptfed serve only"
            )
        return found.promptfed

    async def _home(self) -> _Home:
        """The client and the turnstile of the event loop that runs: connections belong to the loop they began in."""
        loop = asyncio.get_running_loop()
        if loop not in self._homes:
            host = urlsplit(self._url).hostname or ""
            client = openai.AsyncOpenAI(
                base_url=self._url,
                api_key=self._key or "none",
                max_retries=0,
                timeout=openai.Timeout(self._timeout_s, connect=min(self._timeout_s, CONNECT_S)),
                http_client=openai.DefaultAsyncHttpxClient(
                    verify=self._tls,
                    follow_redirects=False,  # texts go to the address that was given, or nowhere
                    trust_env=not (host.startswith("127.") or host in ("localhost", "::1")),  # nor to a proxy
                ),
            )
            closing = self._close_at_end(loop, client)
            self._homes[loop] = client, asyncio.Semaphore(MAX_REQUESTS), closing
            await anext(closing)
        return self._homes[loop]

    async def _close_at_end(self, loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> AsyncGenerator[None]:
        """Waits to be closed: `asyncio.run` closes generators that are still open while connections can be, too."""
        try:
            yield
        finally:
            del self._homes[loop]
            await client.close()


def _parse(name: str) -> tuple[str, str]:
    """Model and base URL of ``MODEL@URL``. What may be a secret in it is not repeated in the error."""
    found = _ADDRESS.fullmatch(name)
    if found is None:
        raise ConfigError("an OpenAI-compatible FM is openai:MODEL@URL, such as openai:NAME@http://127.0.0.1:8700/v1")
    model, url = found["model"], found["url"].rstrip("/")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"the address openai:{model}@... has no valid host and port") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"the URL in openai:{model}@... holds a user, a query or a fragment; an address names scheme, host and "
            f"path only. A key goes into the environment variable {KEY_VARIABLE}"
        )
    if not host or not parts.path:
        raise ConfigError(f"{url} is not the base URL of an OpenAI-compatible server; did you mean {url}/v1?")
    return model, url


def _calls(requests: Sequence[FMRequest]) -> Iterator[list[int]]:
    """Which requests go together: those that differ in the text to score only, or in the seed to write with."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for i, r in enumerate(requests):
        if isinstance(r, LabelRequest):
            alike[r.prefix, r.suffix, r.labels].append(i)
        else:
            alike[replace(r, seed=0)].append(i)
    for items in alike.values():
        call: list[int] = []
        n_characters = 0
        for i in items:
            r = requests[i]
            size, limit = (len(r.text), MAX_LABEL_ITEMS) if isinstance(r, LabelRequest) else (0, MAX_TEXT_ITEMS)
            if call and (len(call) == limit or n_characters + size > MAX_CHARACTERS):
                yield call
                call, n_characters = [], 0
            call.append(i)
            n_characters += size
        yield call


def _parts(requests: Sequence[FMRequest]) -> dict[str, Any]:
    """The fields of the HTTP request that carries these, which `_calls` put together."""
    first = requests[0]
    if isinstance(first, LabelRequest):
        shared = {"prefix": first.prefix, "suffix": first.suffix, "labels": first.labels}
        texts = [r.text for r in requests if isinstance(r, LabelRequest)]
        return {"prompt": texts, "max_tokens": 1, "extra_body": {"promptfed": shared}}
    return {
        "prompt": first.prompt,
        "n": len(requests),
        "max_tokens": first.max_tokens,
        "temperature": first.temperature,
        "top_p": first.top_p,
        "stop": list(first.stop),
        "extra_body": {"promptfed": {"seeds": [r.seed for r in requests if isinstance(r, TextRequest)]}},
    }


def _answer(request: FMRequest, choice: dict[str, Any]) -> FMResponse:
    """The answer in a choice, if it is whole: as many finite numbers as labels, or a text."""
    try:
        answer = _RESPONSE.validate_python(choice.get("promptfed"))
    except ValidationError:
        return FMResponse(error="malformed answer")
    if answer.error is not None:
        return FMResponse(error="the server could not answer this item")
    n_labels = len(request.labels) if isinstance(request, LabelRequest) else 0
    counts = (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens, answer.usd)
    whole = (
        len(answer.logprobs or ()) == n_labels
        and (answer.text is None) == isinstance(request, LabelRequest)
        and (answer.label_tokens is None or len(answer.label_tokens) == n_labels)
        and all(map(math.isfinite, (*(answer.logprobs or ()), *counts)))
        and min(counts) >= 0
    )
    return answer if whole else FMResponse(error="malformed answer")


def _is_outage(error: Exception) -> bool:
    """Whether it says nothing of what was asked: no connection, no answer in time, a key that is refused, too many
    requests, a server that fails."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (401, 403, 404, 408, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | TimeoutError)


def _kind(error: Exception) -> str:
    """The status or the class of an error, whose own words may quote a text or a key."""
    return f"HTTP {error.status_code}" if isinstance(error, openai.APIStatusError) else type(error).__name__
