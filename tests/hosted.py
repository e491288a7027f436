"""A stand-in for hosted models: a small language model behind OpenAI's schema, on a loopback port.

It knows nothing of promptfed. `LittleModel` gives the next word its probability by a rule that a reader can follow.
`Hosted` serves it in one of several moods (what real servers can and refuse), counts what it answered, and, if it is
told so, fails (`Faults`). `Site` is the port, which can go down and come back. Whatever is refused is quoted in the
error, as real servers do.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal
from zlib import crc32

import numpy as np
import uvicorn

from promptfed.fm.openai import OpenAIFM
from promptfed.prompts.template import content_hash
from tests.support import CHEERFUL, GLOOMY, THINGS

Mood = Literal["vllm", "completions", "chat", "chat-new", "schema", "words"]
# Every fault that a server or the way to it may have. From "cut within" on, the model was asked, and paid.
FAULTS = (
    "429",
    "500",
    "502",
    "503",
    "cut",
    "cut within",
    "slow",
    "truncated",
    "html",
    "choices",
    "missing",
    "nan",
    "inf",
)
NAME = "little"
# What the client asks to find out what a server can: no text of anybody.
PROBES = ("The sky is", " blue", " not blue")

VOCABULARY = tuple(f" {word}" for word in ("positive", "negative", *CHEERFUL, *GLOOMY, *THINGS, "the", "and"))
LEAN = dict.fromkeys(("positive", *CHEERFUL), 1) | dict.fromkeys(("negative", *GLOOMY), -1)
_FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"}
_CHAT_FIELDS = (_FIELDS - {"prompt"}) | {"messages", "top_logprobs", "max_completion_tokens", "response_format"}
_VLLM_FIELDS = _FIELDS | {
    "logprob_token_ids",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "add_special_tokens",
    "prompt_logprobs",
    "cache_salt",
}


class LittleModel:
    """Next-word probabilities over `VOCABULARY` and a full stop: a softmax of logits that add up from

    - 2 for each cheerful word in the prompt's last block less each gloomy one, for a word that is cheerful itself
      (times -1 for a gloomy one),
    - 4 for the two label words behind a colon; 4 for the full stop behind a word, -6 else,
    - up to 1 either way from a hash of the word and the blocks before: a prompt's own bias.
    """

    def next(self, prompt: str) -> Mapping[str, float]:
        """The log-probability of every token, in the order of `VOCABULARY`, the full stop last."""
        return _next(prompt)

    def logprob(self, prompt: str, token: str) -> float:
        """Of any token; one that the model does not know has -20."""
        return self.next(prompt).get(token, -20.0)

    def best(self, prompt: str, options: Sequence[str]) -> str:
        """The option whose first word is the most probable next one."""
        return max(options, key=lambda option: self.logprob(prompt, tokens(f" {option}")[0]))

    def write(self, prompt: str, seed: int) -> str:
        """A review of three words. It leans to where the prompt asks for ("clearly positive")."""
        rng = np.random.default_rng(crc32(f"{seed} {prompt}".encode()))
        asked = re.findall(r"clearly (\w+)", prompt)
        cheerful = LEAN.get(asked[-1], 0) > 0 if asked else rng.random() < 0.5
        return f"A {rng.choice(CHEERFUL if cheerful else GLOOMY)} {rng.choice(THINGS)}."


def tokens(text: str) -> list[str]:
    """Words with the space before them; all else by the character."""
    return re.findall(r" ?\w+|[^\w]", text)


def token_id(token: str) -> int:
    return crc32(token.encode()) % 100_000


@lru_cache(maxsize=100_000)
def _next(prompt: str) -> Mapping[str, float]:
    before, _, last = prompt.rpartition("\n\n")
    mood = sum(LEAN.get(word, 0) for word in re.findall(r"\w+", last))
    logits = {}
    for token in VOCABULARY:
        word = token.strip()
        bias = crc32(f"{word} {before}".encode()) / 2**31 - 1.0
        is_label = word in ("positive", "negative") and prompt.endswith(":")
        logits[token] = 2.0 * LEAN.get(word, 0) * mood + 4.0 * is_label + bias
    logits["."] = 4.0 if re.search(r"\w$", prompt) else -6.0
    total = float(np.logaddexp.reduce(list(logits.values())))
    return {token: logit - total for token, logit in logits.items()}


@dataclass
class Faults:
    """Which requests fail, and how: the same ones whenever they are asked, in whatever order.

    ``share`` of all requests fail, but none of an item's first ``most`` is followed by another: then it is answered.
    """

    seed: int
    kinds: Sequence[str] = FAULTS
    share: float = 0.3
    most: int = 2
    retry_after: str = "0.01"

    def of(self, items: Sequence[str], n_before: int) -> str | None:
        """What befalls a request with ``items``, of which one was asked ``n_before`` times."""
        if n_before >= self.most:
            return None
        rng = np.random.default_rng([self.seed, n_before, crc32(items[0].encode())])
        return str(rng.choice(self.kinds)) if rng.random() < self.share else None


@dataclass
class Hosted:
    """The server, an ASGI application. An *item* is a prompt with all that was asked of it, as a hash.

    ``delivered`` counts answers to items that went out whole and well, ``spoilt`` those that were answered (and would
    be paid) but were cut, garbled or came too late. Both leave out what tells no text of anybody: what the client asks
    to find out what the server can, and label words' tokens. ``bodies`` has every request, in order.
    ``down_at``: the number of the delivered answer after which the server pulls its own plug.
    """

    mood: Mood
    faults: Faults | None = None
    down_at: int | None = None
    fingerprint: str | None = "fp-1"
    model: LittleModel = field(default_factory=LittleModel)
    delivered: Counter[str] = field(default_factory=Counter)
    spoilt: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    plug: Any = None
    _asked: Counter[str] = field(default_factory=Counter)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw = b""
        while (message := await receive())["type"] == "http.request":
            raw += message["body"]
            if not message["more_body"]:
                break
        path = scope["path"].removeprefix("/v1")
        body = json.loads(raw) if raw else {}
        self.bodies += [body] if body else []
        items = list(self._items(path, body))
        asked = max(self._asked[item] for item in items)
        self._asked.update(set(items))
        fault = self.faults.of(items, asked) if self.faults else None
        if fault in ("slow", "cut", "cut within", "choices", "missing", "nan", "inf") and self._is_overhead(path, body):
            fault = None  # these would make a server look like one that can do less, or is not there
        self.met.update([fault] if fault else [])
        if fault is not None and fault.isdigit():
            said = {"error": {"message": f"can't do {raw.decode()}"}}
            after = [(b"retry-after", self.faults.retry_after.encode())] if self.faults and fault == "429" else []
            await _respond(send, int(fault), json.dumps(said).encode(), after)
            return
        if fault == "cut":
            await _hang_up(receive)
            return
        status, answer = self.answer(path, body)
        spoilt = items if fault and status == 200 else []
        if fault in ("choices", "missing", "nan", "inf"):
            spoilt = _spoil(answer, items, fault)
        payload = json.dumps(answer).encode()
        if not self._is_overhead(path, body):
            self.spoilt.update(spoilt)
            self.delivered.update((Counter(items) - Counter(spoilt)) if status == 200 else ())
        if self.down_at is not None and sum(self.delivered.values()) >= self.down_at:
            self.down_at = None
            self.plug()
        if fault == "truncated":
            payload = payload[: len(payload) // 2]
        elif fault == "html":
            payload = b"<html>" + payload
        if fault in ("slow", "cut within"):
            await _respond(send, status, payload, (), half=True)
            if fault == "slow":
                while (await receive())["type"] != "http.disconnect":
                    pass
            await _hang_up(receive)
            return
        await _respond(send, status, payload)

    def _items(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        shared = {k: v for k, v in body.items() if k not in ("prompt", "cache_salt")}
        for prompt in _prompts(body) or [path]:
            yield content_hash([path, shared, prompt])

    def _is_overhead(self, path: str, body: dict[str, Any]) -> bool:
        asked = body["messages"][-1]["content"] if "messages" in body else (_prompts(body) or [PROBES[0]])[0]
        return path == "/models" or asked.startswith(PROBES) or "return_token_ids" in body

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body, without faults. Tests override it to answer oddly."""
        if path == "/models":
            return 200, {"object": "list", "data": [{"id": NAME, "object": "model"}]}
        chats = self.mood not in ("vllm", "completions")
        if path != ("/chat/completions" if chats else "/completions"):
            return 404, {"error": {"message": f"no such path: {path} {body}"}}
        known = _CHAT_FIELDS if chats else _VLLM_FIELDS if self.mood == "vllm" else _FIELDS
        limit = "max_completion_tokens" if self.mood == "chat-new" else "max_tokens"
        refused = (
            set(body) - known
            or (self.mood == "completions" and body.get("logprobs", 0) > 5)
            or (chats and limit not in body)
            or (self.mood == "schema" and "logprobs" in body)
        )
        if refused:
            return 400, {"error": {"message": f"can't do {json.dumps(body)}", "type": "invalid_request_error"}}
        choices = [self._chat(body)] if chats else [self._complete(prompt, body) for prompt in _prompts(body)]
        read = sum(len(tokens(prompt)) for prompt in _prompts(body))
        usage = {"prompt_tokens": read, "completion_tokens": len(choices), "total_tokens": read + len(choices)}
        numbered = [{"index": i, "finish_reason": "stop", **choice} for i, choice in enumerate(choices)]
        return 200, {"model": NAME, "system_fingerprint": self.fingerprint, "choices": numbered, "usage": usage}

    def _complete(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        told = self.model.next(prompt)
        ranked = sorted(told, key=lambda token: -told[token])
        text = self.model.write(prompt, body.get("seed", 0)) if body["max_tokens"] > 1 else ranked[0]
        choice: dict[str, Any] = {"text": text, "logprobs": None}
        if "logprobs" in body:
            top = {token: told[token] for token in ranked[: body["logprobs"]]}
            if "logprob_token_ids" in body:
                names = {token_id(token): token for token in told}
                by_id = {token_id(t): lp for t, lp in top.items()}
                by_id |= {i: self.model.logprob(prompt, names.get(i, "")) for i in body["logprob_token_ids"]}
                top = {f"token_id:{i}": logprob for i, logprob in by_id.items()}
            choice["logprobs"] = {"top_logprobs": [top]}
        if "return_token_ids" in body:
            choice["prompt_token_ids"] = [token_id(token) for token in tokens(prompt)]
        if "prompt_logprobs" in body:
            parts = tokens(prompt)
            starts = np.cumsum([0, *map(len, parts)])
            read = [self.model.logprob(prompt[: starts[i]], part) for i, part in enumerate(parts)]
            seen = [{str(token_id(part)): {"logprob": lp}} for part, lp in zip(parts, read, strict=True)]
            choice["prompt_logprobs"] = [None, *seen[1:]]
        return choice

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        *told, asked = (message["content"] for message in body["messages"])
        top = None
        text = self.model.write(asked, body.get("seed", 0))
        if body.get("logprobs") and self.mood in ("chat", "chat-new"):
            # A chat's answer begins without a space and with a capital.
            said = {token.strip().capitalize(): lp for token, lp in self.model.next(asked).items()}
            text, *_ = ranked = sorted(said, key=lambda token: -said[token])[: body["top_logprobs"]]
            top = {"content": [{"token": text, "top_logprobs": [{"token": t, "logprob": said[t]} for t in ranked]}]}
        elif "response_format" in body and self.mood == "schema":
            options = body["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"]
            text = json.dumps({"label": self.model.best(asked, options)})
        elif told:
            text = f"I think it is {self.model.best(asked, told[0].partition(': ')[2].split(', ')).capitalize()}."
        return {"message": {"role": "assistant", "content": text}, "logprobs": top}


def _prompts(body: dict[str, Any]) -> list[str]:
    if "messages" in body:
        return [json.dumps(body["messages"])]
    return list(body.get("prompt", []))


def _spoil(answer: Any, items: list[str], fault: str) -> list[str]:
    """Break the answer's first item, or all of it; returns the items that are broken."""
    if fault == "choices":
        answer["choices"].pop()
        return items
    first = answer["choices"][0]
    numbers = list(_places(first.get("prompt_logprobs"))) + list(_places(first["logprobs"]))
    if fault == "missing" or not numbers:
        first["logprobs"] = first["prompt_logprobs"] = first["text"] = None
        first["message"] = {"content": None}
    else:
        for place, key in numbers:
            place[key] = float(fault)
    return items[:1]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where in a structure there are numbers."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, float):
                yield value, key
            else:
                yield from _places(inner)


async def _respond(send: Any, status: int, payload: bytes, more: Sequence[Any] = (), half: bool = False) -> None:
    """Send an answer, or only its first half."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(payload)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    sent = payload[: len(payload) // 2] if half else payload
    await send({"type": "http.response.body", "body": sent, "more_body": half})


async def _hang_up(receive: Any) -> None:
    """Cut the connection under a request: ASGI has no word for it, so it is taken from uvicorn."""
    receive.__self__.transport.close()
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


class Site:
    """``app`` on a loopback port of its own. It can go down and come back on the same port."""

    def __init__(self, app: Hosted) -> None:
        self.app, self._port = app, 0
        app.plug = self._unplug

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def address(self) -> str:
        """What a configuration calls it."""
        return f"openai:{self.url}#{NAME}"

    def connect(self, timeout_s: float = 20.0) -> OpenAIFM:
        """A client of it."""
        return OpenAIFM(f"{self.url}#{NAME}", timeout_s=timeout_s)

    def start(self) -> None:
        # By the name of TCP, asyncio sends small answers at once, and does not wait 40 ms for more to go with them.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, http="h11", ws="none", lifespan="off", log_config=None, log_level="warning")
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)

    def wait_until_down(self) -> None:
        self._thread.join(timeout=30)
        self._listener.close()

    def stop(self) -> None:
        self._unplug()
        self.wait_until_down()

    def _unplug(self) -> None:
        self._server.should_exit = True

    def __enter__(self) -> Site:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
