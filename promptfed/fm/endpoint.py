"""The way to an OpenAI-compatible server: one `openai` client an event loop, a bounded number of requests at once.

The texts go to the server and nowhere else: not into logs, errors or exceptions. What the server says in an error is
not repeated either, since it may quote what it was sent. To ask again is the affair of
`promptfed.fm.decorators.Retrying`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from promptfed.errors import ConfigError
from promptfed.ports import is_loopback

# Not OPENAI_API_KEY: a key for one provider must not go to whatever address a configuration names.
KEY_VARIABLE = "PROMPTFED_API_KEY"
CONNECT_S = 5.0
# A server that asks for more patience than this is asked again all the same.
MAX_RETRY_AFTER_S = 120.0

_ADDRESS = re.compile(r"(?P<url>https?://[^\s#]+)#(?P<model>.+)")
_Home = tuple[openai.AsyncOpenAI, asyncio.Semaphore, AsyncGenerator[None]]


class UnansweredError(Exception):
    """A request without a usable answer. ``kind`` is the HTTP status or the class of what went wrong.

    ``outage``: nothing is said of what was asked (no connection, no answer in time, a refused key, no money left, too
    many requests, a server that fails, an answer that was cut). ``garbled``: what came is no JSON: it was cut, or is
    not of such a server. ``refused``: fault is found with this very request.
    """

    def __init__(self, error: Exception) -> None:
        self.status = error.status_code if isinstance(error, openai.APIStatusError) else None
        # Never the error's own words, which may quote a text or a key.
        self.kind = f"HTTP {self.status}" if self.status else type(error).__name__
        self.garbled = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        self.outage = (
            self.garbled
            or isinstance(error, openai.APIConnectionError | TimeoutError)
            or (self.status is not None and (self.status in (401, 402, 403, 404, 408, 409, 429) or self.status >= 500))
        )
        # A text with half a character (a lone surrogate) does not get as far as the server.
        self.refused = self.status in (400, 413, 422) or isinstance(error, UnicodeEncodeError)
        self.retry_after_s = _retry_after(error) if isinstance(error, openai.APIStatusError) else None
        super().__init__(self.kind)


class Endpoint:
    """A base URL, a key from ``PROMPTFED_API_KEY`` and a limit of requests on their way at once.

    ``timeout_s`` bounds each request, from its turn to the last byte of its answer.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.url = url
        self.key = os.environ.get(KEY_VARIABLE, "").strip() or None
        self.timeout_s = timeout_s
        self.max_requests = 1
        self._tls = httpx2.create_ssl_context()  # takes longer to make than a client
        self._homes: dict[asyncio.AbstractEventLoop, _Home] = {}

    async def get(self, path: str, timeout_s: float) -> Any:
        """The JSON at ``path``. Raises `UnansweredError`."""
        return await self._ask("get", path, None, timeout_s)

    async def post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        """The JSON that answers ``body``. Raises `UnansweredError`."""
        return await self._ask("post", path, body, timeout_s or self.timeout_s)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        client, turns, _ = await self._home()
        try:
            async with turns, asyncio.timeout(timeout_s):
                if method == "get":
                    raw = await client.get(path, cast_to=httpx2.Response)
                else:
                    raw = await client.post(path, body=body, cast_to=httpx2.Response)
                return json.loads(raw.content)
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            raise UnansweredError(error) from None

    async def _home(self) -> _Home:
        """The client and the turnstile of the event loop that runs: connections belong to the loop they began in."""
        loop = asyncio.get_running_loop()
        if loop not in self._homes:
            host = urlsplit(self.url).hostname or ""
            client = openai.AsyncOpenAI(
                base_url=self.url,
                api_key=self.key or "none",
                max_retries=0,
                timeout=openai.Timeout(self.timeout_s, connect=min(self.timeout_s, CONNECT_S)),
                http_client=openai.DefaultAsyncHttpxClient(
                    verify=self._tls,
                    follow_redirects=False,  # texts go to the address that was given, or nowhere
                    trust_env=not is_loopback(host),  # nor to a proxy
                ),
            )
            closing = self._close_at_end(loop, client)
            self._homes[loop] = client, asyncio.Semaphore(self.max_requests), closing
            await anext(closing)
        return self._homes[loop]

    async def _close_at_end(self, loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> AsyncGenerator[None]:
        """Waits to be closed: `asyncio.run` closes generators that are still open while connections can be, too."""
        try:
            yield
        finally:
            del self._homes[loop]
            await client.close()


def parse_address(name: str) -> tuple[str, str]:
    """Base URL and model of ``URL#MODEL``. What may be a secret in it is not repeated in the error."""
    found = _ADDRESS.fullmatch(name)
    if found is None:
        raise ConfigError("an OpenAI-compatible FM is openai:URL#MODEL, such as openai:http://127.0.0.1:8700/v1#NAME")
    model, url = found["model"], found["url"].rstrip("/")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"the address openai:...#{model} has no valid host and port") from None
    if parts.username is not None or parts.password is not None or parts.query:
        raise ConfigError(
            f"the URL in openai:...#{model} holds a user or a query; an address names scheme, host and path only. "
            f"A key goes into the environment variable {KEY_VARIABLE}"
        )
    if not host or not parts.path:
        raise ConfigError(f"{url} is not the base URL of an OpenAI-compatible server; did you mean {url}/v1?")
    return url, model


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds of a Retry-After header, at most `MAX_RETRY_AFTER_S`; dates are taken for no wish."""
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(seconds, MAX_RETRY_AFTER_S) if seconds >= 0 else None
