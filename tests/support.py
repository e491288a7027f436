"""What several test modules build their scenes from: a tiny encoder, made-up texts, clients without weights."""

from __future__ import annotations

import asyncio
import csv
import errno
import gzip
import hashlib
import os
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from clients.client import Client
from clients.data import ClientData, Labelled, scoring_order
from clients.domain_models.base import Averageable
from promptfed.federation.checkpoint import Checkpoint
from promptfed.federation.events import EventLog
from promptfed.federation.inprocess import InProcessTransport
from promptfed.federation.server import Server
from promptfed.fm.base import BaseFM, WrappedFM
from promptfed.fm.journal import RecordingFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.ledger import Ledger, Usage
from promptfed.messages import Join, NewtonPart, Reply, ReplyBody
from promptfed.privacy.secret import simulated_key
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import NewtonSums
from promptfed.strategies.base import Federation, Round, Steps
from promptfed.types import Capability, FloatArray, FMRequest, FMResponse

T = TypeVar("T")

DEMO = Path(__file__).parent.parent / "examples" / "sentiment5"
LABELS = ("negative", "positive")
CHEERFUL = ("wonderful", "superb", "lovely", "brilliant", "charming", "splendid")
GLOOMY = ("dreadful", "boring", "horrid", "clumsy", "tedious", "stale")
THINGS = ("film", "story", "cast", "music", "plot", "ending")


JOIN = Join(labels=LABELS, seed=1)


class WordEncoder:
    """Unit vectors from a bag of words hashed into 64 places: no weights, the same on every machine."""

    encoder_id = "words-64"

    def __init__(self, dimension: int = 64) -> None:
        self._dimension = dimension

    def encode(self, texts: Sequence[str]) -> FloatArray:
        out = np.zeros((len(texts), self._dimension))
        for row, text in zip(out, texts, strict=True):
            row[0] = 0.1  # a text without words has a direction too
            for word in re.findall(r"[a-z]+", text.lower()):
                row[1 + int(hashlib.sha256(word.encode()).hexdigest(), 16) % (self._dimension - 1)] += 1.0
        return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True))


class FailingFM(BaseFM):
    """Raises what it is given, or answers with failures as values."""

    fm_id = "failing@0"
    capabilities = frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS})

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        if self._error is not None:
            raise self._error
        return [FMResponse(error="refused") for _ in requests]


class CountingFM(WrappedFM):
    """Passes everything on and remembers the size of each batch and every request."""

    def __init__(self, inner: BaseFM) -> None:
        super().__init__(inner)
        self.batches: list[int] = []
        self.requests: list[FMRequest] = []

    @property
    def n_calls(self) -> int:
        return len(self.requests)

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        self.batches.append(len(requests))
        self.requests += requests
        return await self._inner.complete(requests)


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end."""
    return asyncio.run(coroutine)


def sentences(n: int, seed: int = 0, n_words: int = 6) -> Labelled:
    """``n`` made-up reviews, half of each label; the label shows in one word out of ``n_words`` that mean the same."""
    rng = np.random.default_rng([seed, 5])
    labels = np.arange(n) % 2
    texts = []
    for label in labels:
        word = str(rng.choice((CHEERFUL if label else GLOOMY)[:n_words]))
        texts.append(f"The {rng.choice(THINGS)} and the {rng.choice(THINGS)} seemed {word}.")
    order = scoring_order(labels, rng)
    return Labelled(texts=tuple(texts[i] for i in order), labels=labels[order].astype(np.int64))


def public_texts(n_words: int = 6) -> tuple[str, ...]:
    """Unlabelled texts of the same kind that everybody may read."""
    return tuple(f"A {word} {thing}." for thing in THINGS[:3] for word in (*CHEERFUL[:n_words], *GLOOMY[:n_words]))


TOPICS = ("art", "cooking", "gardening", "law", "sport", "travel")
TOPIC_WORDS = (
    ("canvas", "painter", "gallery"),
    ("oven", "recipe", "flour"),
    ("soil", "tulip", "hedge"),
    ("judge", "verdict", "statute"),
    ("goal", "referee", "league"),
    ("airport", "luggage", "hotel"),
)


def topic_texts(n: int, seed: int = 0, alpha: float = 0.5) -> Labelled:
    """``n`` made-up notes on six topics, shared out by Dirichlet(``alpha``); the topic shows in a word."""
    rng = np.random.default_rng([seed, 6])
    labels = rng.choice(len(TOPICS), size=n, p=rng.dirichlet(np.full(len(TOPICS), alpha)))
    texts = tuple(f"We spoke of the {rng.choice(TOPIC_WORDS[k])} for {rng.integers(2, 90)} minutes." for k in labels)
    return Labelled(texts=texts, labels=labels.astype(np.int64))


def public_topic_texts() -> tuple[str, ...]:
    return tuple(f"It is about the {word}." for words in TOPIC_WORDS for word in words)


def client_data(client_id: str, n_train: int = 20, n_test: int = 10, seed: int = 0, n_words: int = 6) -> ClientData:
    """One client's made-up texts; another ``seed``, other texts."""
    return ClientData(
        client_id=client_id, train=sentences(n_train, seed, n_words), test=sentences(n_test, seed + 1000, n_words)
    )


def topic_data(client_id: str, n_train: int = 20, n_test: int = 10, seed: int = 0, **_: Any) -> ClientData:
    """One client's made-up notes on six topics."""
    return ClientData(client_id=client_id, train=topic_texts(n_train, seed), test=topic_texts(n_test, seed))


@dataclass
class Bench:
    """A whole federation in this process, on a foundation model without weights."""

    clients: dict[str, Client]
    server: Server
    ledger: Ledger
    events: EventLog
    fm: CountingFM
    options: dict[str, Any] = field(default_factory=dict)

    def federation(self, **changes: Any) -> Federation:
        values: dict[str, Any] = {
            "clients": {c: len(client.data.train) for c, client in sorted(self.clients.items())},
            "instruction": "Is the review negative or positive?",
            "public": public_texts(),
            "max_fm_calls": 1000,
            "max_prompts": 2,
            "seed": 1,
            "log": self.events.add,
            **self.options,
            **changes,
        }
        return Federation(**values)

    def drive(self, steps: Steps[T], max_fm_calls: int, phase: Any = "tuning") -> T:
        return wait_for(self.server.drive(steps, phase, max_fm_calls))


def bench(
    n_clients: int = 3,
    n_train: int = 20,
    n_test: int = 10,
    *,
    fm: BaseFM | None = None,
    n_words: int = 6,
    checkpoint: Checkpoint | None = None,
    wrap: Callable[[InProcessTransport], Any] = lambda transport: transport,
    folder: Path | None = None,
    topics: bool = False,
    labels: tuple[str, ...] = LABELS,
    data: Callable[..., ClientData] = client_data,
    **options: Any,
) -> Bench:
    """``n_clients`` clients with ``n_train`` texts each, a server and books. ``wrap`` may put a fault on the wire;
    under ``folder`` each client keeps its journal and history. ``data`` makes a client's texts; ``topics``: texts of
    six labels, unevenly dealt."""
    if topics:
        labels, data = TOPICS, topic_data
        task = {"labels": TOPICS, "words": TOPICS, "public": public_topic_texts(), "instruction": "What is the topic?"}
        options = {**task, **options}
    counting = CountingFM(fm or ScriptedFM())
    ledger, events = Ledger(), EventLog()
    clients = {}
    for c in range(n_clients):
        mine = data(f"client{c}", n_train, n_test, seed=c, n_words=n_words)
        own = folder / mine.client_id if folder else None
        source: BaseFM = RecordingFM(counting, own / "journal.jsonl") if own else counting
        clients[mine.client_id] = Client(
            mine, labels, source, WordEncoder(), seed=1, folder=own, noise_key=simulated_key(1, mine.client_id)
        )
    server = Server(wrap(InProcessTransport(clients)), ledger, events, checkpoint)
    options = {"labels": labels, "words": labels, **options}
    return Bench(clients=clients, server=server, ledger=ledger, events=events, fm=counting, options=options)


def demo_rows(part: str) -> list[dict[str, str]]:
    """The rows of one of the demo's files: train, test or public."""
    with gzip.open(DEMO / f"{part}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pooled_accuracy(prompt: PromptSet, n: int, seed: int) -> float:
    """Of a prompt under its pooled calibration, on ``n`` fresh texts with two words a label."""
    fresh = sentences(n, seed, n_words=2)
    said = [p.label for p in prompt.predict(fresh.texts, fm=ScriptedFM())]
    return float(np.mean([LABELS[y] == label for y, label in zip(fresh.labels, said, strict=True)]))


def reply(body: ReplyBody, client_id: str = "a", fm_calls: int = 0, round_number: int = 1) -> Reply:
    """A reply as the server decodes it."""
    return Reply(round=round_number, client_id=client_id, usage=Usage(fm_calls=fm_calls), body=body)


def flat_newton(n: int, size: int) -> NewtonPart:
    """A part of a Newton step that moves nothing."""
    return NewtonPart.of(NewtonSums(n=n, loss=float(n), gradient=np.zeros(size), hessian=np.zeros((size, size))))


def replies(bodies: Mapping[str, ReplyBody]) -> dict[str, Reply]:
    """What a method is sent: replies by client."""
    return {client: reply(body, client) for client, body in bodies.items()}


def finish(steps: Steps[T], answer: Callable[[Round], Mapping[str, Reply]]) -> tuple[list[Round], T]:
    """Drive a method by hand: ``answer`` gives the replies to each round. The rounds seen, and the method's result."""
    rounds: list[Round] = []
    try:
        round_ = next(steps)
        while True:
            rounds.append(round_)
            # Who answers has made the calls that it was granted.
            calls = {c: round_.grants.get(c, 0) + round_.again.get(c, 0) for c in round_.tasks}
            given = {c: replace(r, usage=Usage(fm_calls=calls.get(c, 0))) for c, r in answer(round_).items()}
            round_ = steps.send(given)
    except StopIteration as done:
        result: T = done.value
        return rounds, result


def parameters_of(client: Client) -> FloatArray:
    """Flat, of the client's domain model."""
    model = client.domain.model
    assert isinstance(model, Averageable)
    return model.parameters


def write_rows(path: Path, by_client: Mapping[str, Labelled]) -> Path:
    """A CSV file (client, text, label) of clients' texts."""
    rows = [(c, t, LABELS[y]) for c, d in by_client.items() for t, y in zip(d.texts, d.labels, strict=True)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("client", "text", "label"), *rows])
    return path


def full_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """A disk that takes ``n`` more bytes of what is appended, and then no more."""
    write, left = os.write, [n]

    def limited(file: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(file, bytes(data)[: left[0]])
        left[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", limited)
