"""What a prompt-federation method is, and the standard client tasks as steps it is written from.

A method is a generator (docs/adr/0001): it yields `Round`s of client tasks and is sent the replies. It does no I/O,
reads no clock and draws from generators seeded by the federation alone, so it is a pure function of the replies it
was sent: a run resumes by sending the recorded replies again, and "what if client 3 had not been there" is a replay.

    class MyMethod:
        name, needs = "my_method", frozenset({Capability.LABEL_LOGPROBS})

        def run(self, federation: Federation) -> Steps[PromptSet]:
            session = Session(federation)
            standings = yield from session.score(prompts, singles(prompts), stop=20)
            best = ...
            return (yield from session.calibrate([best]))
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from promptfed.errors import RunError
from promptfed.messages import (
    Ask,
    MomentSums,
    Newton,
    NewtonPart,
    Reply,
    Score,
    Scored,
    TaskBody,
    Vote,
    Votes,
    Weigh,
    Weighed,
    Write,
    Written,
)
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, NewtonSums, newton_step, prior
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FloatArray, IntArray, LabelRequest, TextRequest

# Times that a round is sent whose answers hold nothing.
MAX_TRIES = 3

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
Replies = Mapping[str, Reply]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Tasks by client, each with the number of FM calls it may make at most.

    ``again`` are calls that were granted to a client that has not replied since, for requests that this task repeats:
    what it has made of them it need not make now, so they are not counted twice.
    """

    name: str
    tasks: Mapping[str, TaskBody]
    grants: Mapping[str, int] = field(default_factory=dict)
    again: Mapping[str, int] = field(default_factory=dict)


Steps = Generator[Round, Replies, T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """What a method may know. ``clients`` maps ids to their number of training texts; it may grow between rounds."""

    clients: Mapping[str, int]
    labels: tuple[str, ...]
    words: tuple[str, ...]
    instruction: str
    public: tuple[str, ...]
    max_fm_calls: int
    max_prompts: int
    seed: int
    log: Callable[[str, Mapping[str, Any]], None] = lambda _kind, _data: None

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator of its own for each ``stream``."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, *stream]))


class Strategy(Protocol):
    """A method. ``needs`` is checked before the first call."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[Capability]: ...

    def run(self, federation: Federation) -> Steps[PromptSet]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a set of prompts did over ``n`` texts: mean score in [0, 1] (higher is better), its paired difference to the
    first set of the same round, and that difference's standard error."""

    n: int
    score: float
    diff: float
    diff_se: float


def singles(prompts: Sequence[PromptTemplate]) -> tuple[tuple[int, ...], ...]:
    """Each prompt as a set of its own."""
    return tuple((i,) for i in range(len(prompts)))


class Session:
    """The standard client tasks, and what they have cost so far.

    ``left`` counts the calls that may still be granted. A grant is spent until the client says what it used of it.
    """

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.left = federation.max_fm_calls
        self._owed: dict[str, int] = {}  # granted to a client since it last replied
        self._scored: dict[tuple[str, str], int] = {}  # (prompt_id, client) -> texts scored
        self._pooled: dict[str, Calibration] = {}  # prompt_id -> label-free calibration of the prompt alone

    def cost(self, prompts: Sequence[PromptTemplate], stop: int, clients: Sequence[str] | None = None) -> int:
        """FM calls that `score` would be granted."""
        return sum(self._cost(prompts, stop, c) for c in clients or self.federation.clients)

    def _cost(self, prompts: Sequence[PromptTemplate], stop: int, client: str) -> int:
        stop = min(stop, self.federation.clients[client])
        return sum(max(0, stop - self._scored.get((p.prompt_id, client), 0)) for p in prompts)

    def reach(self, prompts: Sequence[PromptTemplate], max_calls: int) -> int:
        """The largest ``stop`` up to which ``prompts`` can be scored on every client's texts for ``max_calls``.

        Clients with fewer texts leave their share to the others; one that came late has to catch up.
        """
        longest = max(self.federation.clients.values())
        beyond = bisect_right(range(longest + 1), max_calls, key=lambda stop: self.cost(prompts, stop))
        return max(0, beyond - 1)

    def write(self, requests: Sequence[TextRequest]) -> Steps[list[str]]:
        """What the FM wrote, in order; empty where it wrote nothing."""
        answers = yield from self._deal(
            "write",
            len(requests),
            lambda part: Write(requests=tuple(requests[i] for i in part)),
            Written,
            lambda body: body.texts,
        )
        return [answers.get(i, "") for i in range(len(requests))]

    def weigh(self, openings: Sequence[str], words: Sequence[str]) -> Steps[tuple[FloatArray, IntArray]]:
        """Log-probability of each word after each opening, shape (n_openings, n_words), normalised over the words; and
        each word's number of tokens, 1 where the FM does not say."""
        labels = tuple(" " + word for word in words)
        answers = yield from self._deal(
            "weigh",
            len(openings),
            lambda part: Weigh(
                requests=tuple(LabelRequest(prefix="", text=openings[i], suffix="", labels=labels) for i in part)
            ),
            Weighed,
            lambda b: list(zip(b.logprobs, b.n_tokens, strict=True)) if len(b.logprobs) == len(b.n_tokens) else (),
        )
        out = np.full((len(openings), len(words)), -np.log(max(len(words), 1)))
        n_tokens = np.ones(len(words), dtype=np.int64)
        for i, (row, sizes) in answers.items():
            if len(row) == len(words):
                out[i] = row
            if len(sizes) == len(words):
                n_tokens = np.maximum(n_tokens, sizes)
        return out, n_tokens

    def _deal(
        self,
        name: str,
        n: int,
        task: Callable[[Sequence[int]], TaskBody],
        kind: type[B],
        answers_of: Callable[[B], Sequence[A]],
    ) -> Steps[dict[int, A]]:
        """Deal ``n`` requests out to the clients in contiguous runs; the answer of each, by number.

        What was not answered is dealt once more, to those that did answer.
        """
        clients, waiting, done = list(self.federation.clients), list(range(n)), dict[int, A]()
        for is_again in (False, True):
            if not waiting or not clients or (is_again and len(waiting) > self.left):
                break
            parts = zip(clients, np.array_split(waiting, len(clients)), strict=True)
            dealt = {c: list(map(int, part)) for c, part in parts if len(part)}
            replies = yield from self._exchange(
                name, {c: task(part) for c, part in dealt.items()}, {c: len(part) for c, part in dealt.items()}
            )
            got = {c: answers_of(body) for c, body in _answers(replies, kind, lambda _: True).items()}
            clients = [c for c, part in dealt.items() if len(got.get(c, ())) == len(part)]
            for c in clients:
                done |= zip(dealt[c], got[c], strict=True)
            waiting = [i for i in waiting if i not in done]
        return done

    def vote(self, texts: Sequence[str]) -> Steps[FloatArray]:
        """Mean label probabilities that the clients' domain models give ``texts``, shape (n, n_labels)."""
        replies = yield from self._exchange("vote", {c: Vote(texts=tuple(texts)) for c in self.federation.clients})
        shape = (len(texts), len(self.federation.labels))
        right_size = _answers(replies, Votes, lambda b: (len(b.shares), b.n_labels) == (shape[0] * shape[1], shape[1]))
        votes = [np.frombuffer(b.shares, dtype=np.uint8).reshape(shape) / 255.0 for b in right_size.values()]
        if not votes:
            raise RunError("no client voted; at least one domain model is needed")
        return np.asarray(np.mean(votes, axis=0), dtype=np.float64)

    def ask(
        self, prompts: Sequence[PromptTemplate], stop: int | None, clients: Sequence[str] | None = None
    ) -> Steps[tuple[int, FloatArray, FloatArray]]:
        """Have ``prompts`` scored by the FM on each client's texts [0, stop), where they are not yet.

        Without ``stop``: no call, only what they were scored on before.

        Returns the number of texts and the pooled sums of centred label scores and of their squares, (J, K) each.
        """
        grants = {c: self._cost(prompts, stop or 0, c) for c in clients or self.federation.clients}
        while sum(grants.values()) > self.left and len(grants) > 1:
            # A client that came late has most to catch up on, and may be more than the budget can bear.
            del grants[max(sorted(grants), key=grants.__getitem__)]
        shape = (len(prompts), len(self.federation.labels))
        n, parts = 0, list[MomentSums]()
        for _ in range(MAX_TRIES if stop is None else 1):
            replies = yield from self._exchange(
                "ask", dict.fromkeys(grants, Ask(prompts=tuple(prompts), stop=stop)), grants
            )
            answers = _answers(replies, MomentSums, lambda b: len(b.total) == len(b.squares) == shape[0] * shape[1])
            self._note_scored(prompts, stop or 0, answers)
            parts = list(answers.values())
            n = sum(p.n for p in parts)
            if n:
                break
        else:
            raise RunError("no client scored any text; at least one text is needed")
        total, squares = (
            np.sum([np.reshape(getattr(p, name), shape) for p in parts], axis=0) for name in ("total", "squares")
        )
        for p, t, q in zip(prompts, total, squares, strict=True):
            self._pooled[p.prompt_id] = prior(n, t[None], q[None])
        return n, total, squares

    def score(
        self,
        prompts: Sequence[PromptTemplate],
        sets: Sequence[tuple[int, ...]],
        stop: int,
        clients: Sequence[str] | None = None,
    ) -> Steps[list[Standing]]:
        """Standings of ``sets`` of ``prompts`` on each client's texts [0, stop), summed over clients.

        A client that missed the round in which the FM was to be asked may ask it now, for the same grant.
        """
        asked = list(clients or self.federation.clients)
        yield from self.ask(prompts, stop, asked)
        pooled = [self._pooled[p.prompt_id] for p in prompts]
        body = Score(
            prompts=tuple(prompts),
            sets=tuple(sets),
            stop=stop,
            weights=tuple(c.weights[0] for c in pooled),
            bias=tuple(b for c in pooled for b in c.bias),
        )
        n, n_sets = 0, len(sets)
        for _ in range(MAX_TRIES):  # those that have the scores may just have missed this round
            again = {c: self._cost(prompts, stop, c) for c in asked}
            again = {c: calls for c, calls in again.items() if 0 < calls <= self._owed.get(c, 0)}
            replies = yield from self._exchange("score", dict.fromkeys(asked, body), again=again)
            right_size = _answers(replies, Scored, lambda b: len(b.total) == len(b.diff) == len(b.diff_sq) == n_sets)
            whole = [c for c, body in right_size.items() if body.n == min(stop, self.federation.clients[c])]
            self._note_scored(prompts, stop, whole)
            parts = list(right_size.values())
            n = sum(p.n for p in parts)
            if n:
                break
        else:
            raise RunError("no client scored any text; at least one text is needed")
        total, diff, diff_sq = (
            np.sum([getattr(p, name) for p in parts], axis=0) / n for name in ("total", "diff", "diff_sq")
        )
        spread = np.sqrt(np.maximum(diff_sq - diff**2, 0.0) / n)
        return [
            Standing(n=n, score=float(t), diff=float(d), diff_se=float(s))
            for t, d, s in zip(total, diff, spread, strict=True)
        ]

    def _note_scored(self, prompts: Sequence[PromptTemplate], stop: int, clients: Iterable[str]) -> None:
        for client in clients:
            reached = min(stop, self.federation.clients[client])
            for p in prompts:
                key = (p.prompt_id, client)
                self._scored[key] = max(reached, self._scored.get(key, 0))

    def calibrate(
        self, prompts: Sequence[PromptTemplate], stop: int | None = None, *, strength: float = 4.0, steps: int = 3
    ) -> Steps[PromptSet]:
        """Weigh and calibrate ``prompts`` together on the clients' texts [0, stop), by federated Newton steps.

        Costs FM calls only where a prompt was not scored on those texts yet; without ``stop``, none.
        """
        n, total, squares = yield from self.ask(prompts, stop)
        at = yield from self._newton(prompts, stop, prior(n, total, squares), strength, steps)
        return self.prompt_set(prompts, at)

    def verbalize(
        self, prompts: Sequence[PromptTemplate], *, strength: float = 2.0, steps: int = 2
    ) -> Steps[list[PromptTemplate]]:
        """Learn over all clients how much each label word tells (`PromptTemplate.readout`), on the texts that each
        prompt was scored on; no FM call.

        A word's weight starts at its share of the prompt's own temperature, and is held there by ``strength``.
        """
        learned = []
        for prompt in prompts:
            if prompt.prompt_id not in self._pooled:
                yield from self.ask([prompt], None)
            pooled = self._pooled[prompt.prompt_id]
            label = prompt.word_labels
            share = pooled.weights[0] / np.bincount(label)[label]
            start = Calibration(weights=tuple(share.tolist()), bias=pooled.bias)
            at = yield from self._newton([prompt], None, start, strength, steps, words=True)
            learned.append(replace(prompt, readout=at.weights))
        return learned

    def _newton(
        self,
        prompts: Sequence[PromptTemplate],
        stop: int | None,
        start: Calibration,
        strength: float,
        steps: int,
        *,
        words: bool = False,
    ) -> Steps[Calibration]:
        """``steps`` federated Newton steps from ``start``, to which ``strength`` holds the fit."""
        at, size = start, len(start.weights) + len(start.bias)
        for _ in range(steps):
            body = Newton(prompts=tuple(prompts), stop=stop, weights=at.weights, bias=at.bias, words=words)
            replies = yield from self._exchange(
                "words" if words else "newton", dict.fromkeys(self.federation.clients, body)
            )
            pooled = sum_newton_parts(replies, size)
            if pooled is None:
                raise RunError("no client took part in the calibration; at least one is needed")
            at = newton_step(pooled, at, start, strength)
        return at

    def prompt_set(self, prompts: Sequence[PromptTemplate], calibration: Calibration) -> PromptSet:
        return PromptSet(
            labels=self.federation.labels,
            prompts=tuple(prompts),
            weights=calibration.weights,
            bias=calibration.bias,
        )

    def _exchange(
        self,
        name: str,
        tasks: Mapping[str, TaskBody],
        grants: Mapping[str, int] | None = None,
        again: Mapping[str, int] | None = None,
    ) -> Steps[Replies]:
        """One round, and its part in ``left``."""
        granted = dict(grants or {})
        self.left -= sum(granted.values())
        replies = yield Round(name=name, tasks=dict(tasks), grants=granted, again=dict(again or {}))
        for client in tasks:
            owed = self._owed.pop(client, 0) + granted.get(client, 0)
            if client in replies:
                self.left += max(owed - replies[client].usage.fm_calls, 0)
            else:
                self._owed[client] = owed
        return replies


def _answers(replies: Replies, kind: type[B], fits: Callable[[B], bool]) -> dict[str, B]:
    """Reply bodies of one kind by client. One of the wrong size is left out: a broken client costs only its part."""
    return {c: r.body for c, r in replies.items() if isinstance(r.body, kind) and fits(r.body)}


def sum_newton_parts(replies: Replies, size: int) -> NewtonSums | None:
    """The clients' parts of a Newton step in ``size`` parameters, summed; None where there are none."""
    right_size = _answers(replies, NewtonPart, lambda b: len(b.gradient) ** 2 == len(b.hessian) == size**2)
    total: NewtonSums | None = None
    for part in right_size.values():
        gradient, hessian = np.array(part.gradient), np.reshape(part.hessian, (size, size))
        one = NewtonSums(n=part.n, loss=part.loss, gradient=gradient, hessian=hessian)
        total = one if total is None else total + one
    return total
