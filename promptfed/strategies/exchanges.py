"""Rounds of tasks and what they have cost so far: what a method may still spend, and what any text can be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from promptfed.errors import ConfigError, RunError
from promptfed.messages import TaskBody, Vote, Votes, Weigh, Weighed, Write, Written
from promptfed.strategies.base import Federation, Replies, Round, Steps
from promptfed.types import FloatArray, IntArray, LabelRequest, TextRequest

A = TypeVar("A")
B = TypeVar("B")


class Exchanges:
    """The calls up to each milestone, and the tasks that read no private text but by votes: write, weigh, vote.

    ``left`` counts the calls that may still be granted. A grant is spent until the client says what it used of it.
    """

    def __init__(self, federation: Federation, *, reserve: float) -> None:
        """``reserve``: share of the calls up to a milestone that the search leaves for reading it."""
        self.federation = federation
        self.left = federation.max_fm_calls
        self._reserve = reserve
        within = sorted({m for m in federation.milestones if 0 < m < federation.max_fm_calls})
        self._milestones = [*within, federation.max_fm_calls]  # that are still to be read
        self._since = 0  # calls spent when the last one was read
        self._owed: dict[str, int] = {}  # granted to a client since it last replied

    @property
    def spent(self) -> int:
        """FM calls made, or granted to a client that has not replied since."""
        return self.federation.max_fm_calls - self.left

    @property
    def present(self) -> list[str]:
        """The clients that have answered the last task that they were sent, or were sent none yet."""
        return [client for client in self.federation.clients if client not in self._owed]

    @property
    def milestone(self) -> int:
        """The budget at which the run is read next."""
        return self._milestones[0] if self._milestones else self.federation.max_fm_calls

    @property
    def search_left(self) -> int:
        """Calls that may go into the search before the next milestone is read."""
        return max(self._since + self.budget - int(np.ceil(self._reserve * self.budget)) - self.spent, 0)

    @property
    def is_over(self) -> bool:
        """Whether the last milestone has been read."""
        return not self._milestones

    @property
    def budget(self) -> int:
        """Calls from the last reading to the next milestone."""
        return max(self.milestone - self._since, 0)

    def require(self, needed: int, what: str, otherwise: str = "") -> None:
        """Raise `ConfigError` where fewer than ``needed`` calls are there up to the next milestone; ``what`` needs them
        at least. ``otherwise``: what else would help."""
        if self.budget < needed:
            whole = self.budget == self.federation.max_fm_calls
            key = "budget.max_fm_calls" if whole else "the first of budget.milestones"
            raise ConfigError(f"{key} = {self.budget} is too small for {what}; give at least {needed}{otherwise}")

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
            replies = yield from self.exchange(
                name, {c: task(part) for c, part in dealt.items()}, {c: len(part) for c, part in dealt.items()}
            )
            got = {c: answers_of(body) for c, body in picked(replies, kind, lambda _: True).items()}
            clients = [c for c, part in dealt.items() if len(got.get(c, ())) == len(part)]
            for c in clients:
                done |= zip(dealt[c], got[c], strict=True)
            waiting = [i for i in waiting if i not in done]
        return done

    def vote(self, texts: Sequence[str]) -> Steps[FloatArray]:
        """Mean label probabilities that the clients' domain models give ``texts``, shape (n, n_labels)."""
        replies = yield from self.exchange("vote", {c: Vote(texts=tuple(texts)) for c in self.federation.clients})
        return mean_vote(replies, len(texts), len(self.federation.labels))

    def exchange(
        self,
        name: str,
        tasks: Mapping[str, TaskBody],
        grants: Mapping[str, int] | None = None,
        again: Mapping[str, int] | None = None,
        *,
        optional: bool = False,
    ) -> Steps[Replies]:
        """One round of tasks, and its part in ``left``. ``grants``: the FM calls that each client may make; ``again``
        and ``optional`` as in `Round`."""
        granted = dict(grants or {})
        self.left -= sum(granted.values())
        replies = yield Round(name=name, tasks=dict(tasks), grants=granted, again=dict(again or {}), optional=optional)
        for client in tasks:
            owed = self._owed.pop(client, 0) + granted.get(client, 0)
            if client in replies:
                self.left += max(owed - replies[client].usage.fm_calls, 0)
            else:
                self._owed[client] = owed
        return replies


def mean_vote(replies: Replies, n: int, n_labels: int) -> FloatArray:
    """Votes on ``n`` texts, averaged over clients, (n, K). Raises `RunError` where nobody voted."""
    votes = [body.proba for body in picked(replies, Votes, lambda b: b.fits(n, n_labels)).values()]
    if not votes:
        raise RunError("no client voted; at least one domain model is needed")
    return np.asarray(np.mean(votes, axis=0), dtype=np.float64)


def picked(replies: Replies, kind: type[B], fits: Callable[[B], bool]) -> dict[str, B]:
    """Reply bodies of one kind by client. One of the wrong size is left out: a broken client costs only its part."""
    return {c: r.body for c, r in replies.items() if isinstance(r.body, kind) and fits(r.body)}
