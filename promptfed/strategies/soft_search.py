"""Federated search for a soft prompt by evolution at the clients: what `fedbpt` and `fedavg_bbt` share.

They share all but what the server makes of the clients' means (`Server`). Behind the soft prompt stands a fixed text
prompt: the best of a few with one exemplar a label, as all methods draw them, or the bare instruction. Some clients
a round evolve an intrinsic vector from where the server is; the prompts that come of it are scored on a few texts of
every client, and the text prompt without a soft one is always among those that the result is chosen from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from promptfed.errors import ConfigError, RunError, WireError
from promptfed.messages.methods import Evolve, Evolved, packed, unpacked
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import FRAMES, bare_draft, draft_like, random_draft
from promptfed.prompts.soft import MAX_VECTORS, Projection
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import MAX_TRIES, Card, Federation, Standing, Steps, singles
from promptfed.strategies.evolution import Distribution
from promptfed.strategies.exchanges import picked
from promptfed.strategies.pool import Pool, distinct, log_heat
from promptfed.strategies.proposal import WRITE_SHARE, gather
from promptfed.strategies.session import N_FINALISTS, Session
from promptfed.types import Capability, FloatArray

# Texts, over all clients, that a prompt is scored on during the search.
JUDGE_TEXTS = 20
# Share of the calls up to the first milestone that go into the choice of the text prompt.
TEMPLATE_SHARE = 0.08
# What a client says is worth no more than this: of its fitness, and of its step size in units of the one it was sent.
MAX_FITNESS, MAX_GROWTH = 20.0, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """What a client's search came to. ``weight`` is its number of texts."""

    mean: FloatArray
    prompt: PromptTemplate
    fitness: float
    sigmas: tuple[float, ...]
    weight: int


class Server(Protocol):
    """What the server makes of the clients' means."""

    @property
    def distribution(self) -> Distribution:
        """What the clients start from in the next round."""
        ...

    def tell(self, found: Sequence[Local], losses: Sequence[float], here: float, /) -> None:
        """Move. ``losses`` of the means and ``here``, that of the present mean: lower is better."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftSearch(ABC):
    """The options that both methods have, and the loop."""

    dimension: Annotated[int, Field(ge=2, le=2000)] = 50
    n_vectors: Annotated[int, Field(ge=1, le=MAX_VECTORS)] = 5
    scale: Annotated[float, Field(gt=0)] = 1.0
    sigma: Annotated[float, Field(gt=0)] = 1.0
    population: Annotated[int, Field(ge=4)] = 6
    n_iterations: Annotated[int, Field(ge=1)] = 2
    n_texts: Annotated[int, Field(ge=1)] = 6
    mask_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    calibrated: bool = True
    clients_per_round: Annotated[int, Field(ge=1)] = 3
    shots: Literal[0, 1] = 1
    reserve: Annotated[float, Field(gt=0, lt=1)] = 0.25

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def needs(self) -> frozenset[Capability]:
        soft = frozenset({Capability.LABEL_LOGPROBS, Capability.PROMPT_EMBEDS})
        return soft | {Capability.TEXT} if self.shots else soft

    @property
    def card(self) -> Card:
        sends = frozenset({"evolve", "ask", "score", "newton"})
        return Card(
            paper=self.paper,
            sends=sends | {"write", "weigh", "vote"} if self.shots else sends,
            crosses="The mean of each client's search (an intrinsic vector), its loss and step sizes, and sums of "
            "bounded scores.",
        )

    @property
    @abstractmethod
    def scores_means(self) -> bool:
        """Whether the clients' means are scored at all clients; otherwise the server's alone is."""

    @abstractmethod
    def server(self, federation: Federation, /) -> Server:
        """At the start of the search: mean 0, ``sigma``, C = I."""

    def run(self, federation: Federation) -> Steps[PromptSet]:
        if federation.soft_space is None:
            raise ConfigError(
                f"method {self.name!r} tunes soft prompts, and the foundation model does not say where they live "
                "(soft_space): use embedded:NAME, promptfed serve, or a vLLM server that takes prompt embeddings"
            )
        session = Session(federation, reserve=self.reserve)
        board = Board(session, max(1, round(JUDGE_TEXTS / len(federation.clients))))
        self._check_budget(session, board)
        rng = federation.rng(13)
        template = yield from self._template(session, board.stop, rng)
        projection = Projection.into(
            federation.soft_space,
            seed=federation.seed,
            dimension=self.dimension,
            n_vectors=self.n_vectors,
            scale=self.scale,
            sigma=self.sigma,
        )
        server = self.server(federation)
        # Those who did not answer come last when the next are drawn: a partner that is gone costs one round, not many.
        missed, n_empty = Counter[str](), 0
        present = replace(template, soft=projection.soft(server.distribution.mean))
        yield from board.judge([template, present])
        while True:
            n = self._affordable(session, board)
            if not n:
                prompt = yield from session.conclude(board.best(template, present))
                if session.is_over:
                    return prompt
                continue
            tickets = {c: (missed[c], rng.random()) for c in sorted(federation.clients)}
            chosen = sorted(sorted(tickets, key=tickets.__getitem__)[:n])
            found = yield from self._evolve(session, chosen, template, projection, server.distribution, rng)
            missed.update({c: 1 for c in chosen if c not in found})
            n_empty = 0 if found else n_empty + 1
            if n_empty == MAX_TRIES:
                raise RunError(f"no client came back from {MAX_TRIES} rounds of evolution with a mean that can be used")
            if not found:
                continue
            locals_ = [found[c] for c in sorted(found)]
            losses = [one.fitness for one in locals_]
            if self.scores_means:
                yield from board.judge([one.prompt for one in locals_])
                losses = [board.loss(one.prompt) for one in locals_]
            server.tell(locals_, losses, board.loss(present))
            present = replace(template, soft=projection.soft(server.distribution.mean))
            yield from board.judge([present])
            federation.log(
                "evolution",
                {
                    "fm_calls": session.spent,
                    "n_means": len(found),
                    "sigma": server.distribution.sigma,
                    "losses": losses,
                    "score": -board.loss(present),
                },
            )

    # ---------------------------------------------------------------------------------------------- calls

    def _calls(self, n_texts: int) -> int:
        """FM calls of one client's search: every generation's population and the local mean."""
        n_prompts = self.n_iterations * self.population + 1
        return n_prompts * min(self.n_texts, n_texts) * (2 if self.mask_rate else 1)

    def _cost(self, n: int, session: Session, board: Board) -> int:
        """Of a round with ``n`` clients, at most: their searches, and their means and the server's scored by all."""
        longest = max(session.federation.clients.values())
        return n * self._calls(longest) + (1 + n * self.scores_means) * board.cost

    def _affordable(self, session: Session, board: Board) -> int:
        """How many clients the calls up to the next milestone still pay for; 0 where not even two (or the only one)."""
        most = min(self.clients_per_round, len(session.federation.clients))
        return next(
            (n for n in range(most, min(most, 2) - 1, -1) if self._cost(n, session, board) <= session.search_left), 0
        )

    def _check_budget(self, session: Session, board: Board) -> None:
        """Raises `ConfigError` unless the calls up to the first milestone pay for a round."""
        federation = session.federation
        least = self._cost(min(self.clients_per_round, len(federation.clients), 2), session, board) + 2 * board.cost
        share = self.reserve
        if self.shots:
            least += len(federation.words) + len(FRAMES)
            share += WRITE_SHARE * (1 if federation.public else 2) + TEMPLATE_SHARE
        needed = math.ceil(least / (1 - share)) + 1 if share < 1 else 10**9
        what = f"one round of {self.name} with {len(federation.clients)} clients"
        session.require(needed, what, ", or less to do: population, n_iterations, n_texts")

    # ---------------------------------------------------------------------------------------------- steps

    def _template(self, session: Session, stop: int, rng: np.random.Generator) -> Steps[PromptTemplate]:
        """The text prompt behind the soft one."""
        federation = session.federation
        if not self.shots:
            return bare_draft(federation.instruction, federation.words).template()
        n_calls = int(TEMPLATE_SHARE * session.milestone)
        materials = yield from gather(session, rng)
        pool = Pool(session, stop)
        n = n_calls // sum(min(stop, n) for n in federation.clients.values())
        if n < 2:
            return random_draft(materials, rng).template()
        yield from pool.heat(distinct([draft_like(i, materials, rng) for i in range(n)]))
        return pool.best(1)[0].template()

    def _evolve(
        self,
        session: Session,
        clients: Sequence[str],
        template: PromptTemplate,
        projection: Projection,
        start: Distribution,
        rng: np.random.Generator,
    ) -> Steps[dict[str, Local]]:
        """One search each of ``clients`` from ``start``; what can't be used is left out."""
        task = Evolve(
            template=template,
            projection=projection,
            mean=packed(start.mean),
            sigma=start.sigma,
            form=start.form,
            covariance=start.covariance,
            population=self.population,
            n_iterations=self.n_iterations,
            n_texts=self.n_texts,
            mask_rate=self.mask_rate,
            calibrated=self.calibrated,
            seed=int(rng.integers(2**31)),
        )
        n_texts = session.federation.clients
        grants = {c: self._calls(n_texts[c]) for c in clients}
        replies = yield from session.exchange("evolve", dict.fromkeys(clients, task), grants)
        found = {}
        for client, body in picked(replies, Evolved, lambda b: len(b.sigmas) == self.n_iterations).items():
            try:
                mean = unpacked(body.mean, self.dimension)
                prompt = replace(template, soft=projection.soft(mean))
            except (WireError, ConfigError):  # too short, or beyond what a model may be sent
                continue
            found[client] = Local(
                mean=mean,
                prompt=prompt,
                fitness=min(max(body.fitness, 0.0), MAX_FITNESS),
                sigmas=tuple(float(np.clip(s, 0.0, MAX_GROWTH * start.sigma)) for s in body.sigmas),
                weight=n_texts[client],
            )
        return found


class Board:
    """Prompts with their scores on texts [0, stop) of every client."""

    def __init__(self, session: Session, stop: int) -> None:
        self._session, self.stop = session, stop
        self._entries: dict[PromptTemplate, Standing] = {}

    @property
    def cost(self) -> int:
        """FM calls of a prompt that is not scored yet."""
        return sum(min(self.stop, n) for n in self._session.federation.clients.values())

    def judge(self, prompts: Sequence[PromptTemplate]) -> Steps[None]:
        """Score those that are not scored yet."""
        fresh = [p for p in dict.fromkeys(prompts) if p not in self._entries]
        if not fresh:
            return
        standings = yield from self._session.score(fresh, singles(fresh), self.stop)
        self._entries |= zip(fresh, standings, strict=True)
        leader = max(self._entries, key=lambda p: self._entries[p].score)
        log_heat(self._session, len(fresh), leader, self._entries[leader])

    def loss(self, prompt: PromptTemplate) -> float:
        return -self._entries[prompt].score

    def best(self, *always: PromptTemplate) -> list[PromptTemplate]:
        """As many as `Session.conclude` looks at, best first, ``always`` among them."""
        ranked = sorted(self._entries, key=self.loss)
        others = [p for p in ranked if p not in always][: max(N_FINALISTS - len(set(always)), 0)]
        return sorted({*always, *others}, key=self.loss)
