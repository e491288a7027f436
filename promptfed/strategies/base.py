"""What a prompt-federation method is, and what it may know; `session` has the client tasks that it is written from.

A method is a generator (docs/adr/0001): it yields `Round`s of client tasks and is sent the replies. It does no I/O,
reads no clock and draws from generators seeded by the federation alone, so it is a pure function of the replies it
was sent: a run resumes by sending the recorded replies again, and "what if client 3 had not been there" is a replay.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class MyMethod:
        n_texts: int = 5  # an option: method.options.n_texts

        name: ClassVar[str] = "my_method"
        needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE})
        card: ClassVar[Card] = Card(paper="...", sends=frozenset({"ask", "score"}), crosses="Nothing more.")

        def run(self, federation: Federation) -> Steps[PromptSet]:
            session, best = Session(federation), [...]
            while (yield from session.affords(session.cost(prompts := ..., self.n_texts), best)):
                standings = yield from session.score(prompts, singles(prompts), self.n_texts)
                best = ...
            return (yield from session.conclude(best))

A method is anytime: `Session.affords` and `Session.conclude` read off what its best prompts are worth at each milestone
of the budget, with the calls that are held back for it; the last milestone is the whole budget.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from promptfed.messages import Reply, TaskBody
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, SoftSpace, TaskKind, satisfies

# Times that a round is sent whose answers hold nothing.
MAX_TRIES = 3

T = TypeVar("T")
Replies = Mapping[str, Reply]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Tasks by client, each with the number of FM calls it may make at most.

    ``again`` are calls that were granted to a client that has not replied since, for requests that this task repeats:
    what it has made of them it need not make now, so they are not counted twice.
    ``optional``: the run goes on if too few clients answer, for a round that a few of many are drawn for.
    """

    name: str
    tasks: Mapping[str, TaskBody]
    grants: Mapping[str, int] = field(default_factory=dict)
    again: Mapping[str, int] = field(default_factory=dict)
    optional: bool = False


Steps = Generator[Round, Replies, T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a method had come to when it had spent ``fm_calls``: ``prompt``, and ``single``, the first of its prompts
    alone, both calibrated on the clients' texts [0, stop). ``milestone`` is the budget that it would have had.

    ``finalists`` are the prompts that ``prompt`` was chosen from, all scored on the same texts: each client may choose
    from them for itself. ``by_client`` has what holds for a client in place of this, where clients differ.
    """

    milestone: int
    fm_calls: int
    prompt: PromptSet
    single: PromptSet
    stop: int
    finalists: tuple[PromptTemplate, ...] = ()
    by_client: Mapping[str, Reading] = field(default_factory=dict)

    def of(self, client: str) -> Reading:
        """What ``client`` had come to."""
        return self.by_client.get(client, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """What a method may know. ``clients`` maps ids to their number of training texts; it may grow between rounds.

    Without ``labels`` the task is generation: prompts have no label words (`PromptTemplate`), a score is the token F1
    of the answer, and there are no domain models to vote and nothing to calibrate.

    ``unlabelled`` are the numbers of texts that the clients hold besides, without a label.

    ``milestones`` are smaller budgets, ascending, at which the run is read too: ``read`` is told.
    """

    clients: Mapping[str, int]
    labels: tuple[str, ...]
    words: tuple[str, ...]
    instruction: str
    public: tuple[str, ...]
    max_fm_calls: int
    max_prompts: int
    seed: int
    milestones: tuple[int, ...] = ()
    unlabelled: Mapping[str, int] = field(default_factory=dict)
    soft_space: SoftSpace | None = None
    log: Callable[[str, Mapping[str, Any]], None] = lambda _kind, _data: None
    read: Callable[[Reading], None] = lambda _reading: None

    @property
    def n_train(self) -> int:
        """Training texts of all clients together."""
        return sum(self.clients.values())

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator of its own for each ``stream``."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, *stream]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What to know of a method before choosing it.

    ``sends``: the kinds of task it sends. ``crosses``: what their replies carry, in a sentence. ``privacy_unit``: whose
    data its noise hides, if it adds any. ``reads_text``: it lives on what the FM writes of its mistakes, so it is worth
    little with a model that follows no instructions. ``kinds``: of what is asked of the FM, what it can tune for.
    """

    paper: str
    sends: frozenset[str]
    crosses: str
    privacy_unit: Literal["record", "client"] | None = None
    reads_text: bool = False
    kinds: frozenset[TaskKind] = frozenset({"classification"})


class Strategy(Protocol):
    """A method. ``needs`` is checked before the first call; its options are the fields of its dataclass."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[Capability]: ...

    @property
    def card(self) -> Card: ...

    def run(self, federation: Federation) -> Steps[PromptSet]: ...


def needs_of(method: Strategy, kind: TaskKind) -> frozenset[Capability]:
    """What ``method`` needs of the FM for a task of ``kind``: where there are no labels, none are scored, but answers
    are written."""
    if kind == "classification":
        return method.needs
    return frozenset({Capability.TEXT, *(c for c in method.needs if not satisfies({Capability.LABEL_LOGPROBS}, c))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a set of prompts did over ``n`` texts: mean score in [0, 1] (higher is better), its paired difference to the
    first set of the same round, and that difference's standard error."""

    n: int
    score: float
    diff: float
    diff_se: float


def candidate_sets(n: int, max_prompts: int) -> list[tuple[int, ...]]:
    """Of ``n`` prompts, each alone and all sets of ``max_prompts``: what is compared when a set is chosen."""
    full = combinations(range(n), min(max_prompts, n))
    return list(dict.fromkeys([*singles(range(n)), *full]))


def singles(prompts: Sequence[object]) -> tuple[tuple[int, ...], ...]:
    """Each prompt as a set of its own."""
    return tuple((i,) for i in range(len(prompts)))
