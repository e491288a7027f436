"""``fed_gepa``: a pool of prompts that are the best somewhere, mutated by reflection at one client and merged.

GEPA (Agrawal et al., arXiv 2507.19457) in a federation. A parent is drawn by how often it is the best of the pool on a
text (its per-instance Pareto wins, algorithm 2), which clients count at home and send as sums. A mutation (algorithm 1)
is a reflection at a client over a few of its texts: the FM reads mistakes and rewrites the instruction; only what is
strictly better on those texts, and past the client's leak gate, comes back and is scored by all. Now and then two
parents are merged part by part (the paper's system-aware merge; the parts here are instruction, fields, exemplars and
label words).

What differs, and why. The pool begins with the person's instruction and with drafts of the exemplar pool that all
methods share (`proposal`), as GEPA's modules with demonstrations do. Where reflection brings nothing, which is the
rule with a weak model, the exemplars are varied in its place, and the child has to be better at those clients first,
too. Two clients reflect on a parent in a round, so that one that is away does not stop the run. A parent that is
nowhere the best is not drawn, as in the paper, but wins are by 1 - Brier/2 under calibration and not by exact match,
so ties are rare; where answers are written, wins are by token F1, and ties are shared. GEPA's feedback set and
validation set are apart; here a reflection reads texts that its client has scored the parent on already, so that they
cost nothing, and a candidate is judged by all clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from promptfed.errors import RunError
from promptfed.messages.methods import Wins, Won
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft, Materials, crossover, edit, random_draft
from promptfed.strategies.base import Card, Federation, Steps, singles
from promptfed.strategies.exchanges import picked
from promptfed.strategies.pool import Pool
from promptfed.strategies.proposal import gather, gathering_needs
from promptfed.strategies.reflecting import Reflecting, best_of, first_draft, next_in_turn, public_words
from promptfed.strategies.session import RESERVE, Session
from promptfed.types import Capability, FloatArray

# How many of the pool are scored on more texts before the last are chosen.
N_SECOND = 8
# A model whose reflections brought nothing so often in a row is asked in every second round, then in every third, ...
FRUITLESS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FedGEPA:
    """A candidate is scored on about ``n_texts`` texts of all clients together. Of the calls up to a milestone,
    ``start_share`` go into the first pool and ``second_share`` into scoring the best of the pool on more texts. Parents
    are drawn from the ``n_frontier`` best; ``n_reflecting`` clients try to better one in a round; every
    ``merge_every``th child is a merge. The search for a milestone ends after ``patience`` rounds without a child that
    was worth scoring by all."""

    n_reflecting: int = 2
    n_examples: int = 3
    n_steps: int = 1
    n_texts: int = 25
    start_share: float = 0.2
    second_share: float = 0.12
    n_frontier: int = 8
    merge_every: int = 4
    max_words: int = 60
    max_tokens: int = 90
    patience: int = 25
    reserve: float = RESERVE

    name: ClassVar[str] = "fed_gepa"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE, Capability.TEXT})
    card: ClassVar[Card] = Card(
        paper="GEPA (arXiv 2507.19457)",
        sends=frozenset({"write", "weigh", "vote", "reflect", "wins", "ask", "score", "newton"}),
        crosses="Instructions that the FM wrote from a client's mistakes, past the leak gate; votes on public texts; "
        "sums of bounded scores, and how often each prompt is the best.",
        reads_text=True,
        kinds=frozenset({"classification", "generation"}),
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation, reserve=self.reserve), federation.rng(1)
        pool = Pool(session, max(1, round(self.n_texts / len(federation.clients))))
        start = first_draft(federation)
        reflecting = Reflecting(
            n_examples=self.n_examples,
            n_steps=self.n_steps,
            max_tokens=self.max_tokens,
            max_words=self.max_words,
            known=public_words(federation),
        )
        everywhere = pool.stop * len(federation.clients)
        n_first = max(2, int(session.budget * self.start_share) // everywhere)
        first = gathering_cost(session) + n_first * everywhere
        if not (yield from session.affords(first, [start.template()])):
            return (yield from session.conclude([start.template()]))
        materials = yield from gather(session, rng)
        yield from pool.heat(list(dict.fromkeys([start, *(random_draft(materials, rng) for _ in range(n_first - 1))])))

        search = _Search(self, session, pool, materials, reflecting, rng)
        while True:
            second = int(self.second_share * session.budget)
            n_idle = 0
            while n_idle < self.patience and search.most_calls + second <= session.search_left:
                n_idle = 0 if (yield from search.step()) else n_idle + 1
            templates = best_of(pool, start, N_SECOND)
            stop = session.reach(templates, min(second, session.search_left))
            ranked = yield from session.rank_sets(templates, max(stop, pool.stop))
            prompt = yield from session.conclude(list(dict.fromkeys(templates[i] for chosen in ranked for i in chosen)))
            if session.is_over:
                return prompt


class _Search:
    """Lets a pool grow, child by child."""

    def __init__(
        self,
        method: FedGEPA,
        session: Session,
        pool: Pool,
        materials: Materials,
        reflecting: Reflecting,
        rng: np.random.Generator,
    ) -> None:
        self._method, self._session, self._pool = method, session, pool
        self._materials, self._reflecting, self._rng = materials, reflecting, rng
        self._turns = Counter[str]()
        self._wins: dict[Draft, float] = {}
        self._n_in_pool = self._n_steps = self._n_fruitless = 0

    @property
    def most_calls(self) -> int:
        """What one step may cost: reflections, and a child of each, scored by all."""
        everywhere = self._pool.stop * len(self._session.federation.clients)
        return self._method.n_reflecting * (self._reflecting.cost + everywhere)

    def step(self) -> Steps[bool]:
        """Draw a parent and try to better it; whether the pool grew."""
        yield from self._count_wins()
        self._n_steps += 1
        clients = next_in_turn(self._session.federation.clients, self._turns, self._method.n_reflecting, self._rng)
        parent, other = self._draw()
        if other is not None and self._n_steps % self._method.merge_every == 0:
            return (yield from self._admit([crossover(parent, other, self._rng)], parent, clients))
        if self._n_steps % (1 + self._n_fruitless // FRUITLESS) == 0:
            seed = int(self._rng.integers(2**31))
            given = yield from self._reflecting.reflect(self._session, parent, clients, start=0, seed=seed)
            written = list(dict.fromkeys(replace(parent, instruction=text) for text in given.values()))
            grew = yield from self._admit(written, parent, clients)
            is_better = any(d in self._pool and self._pool[d].score > self._pool[parent].score for d in written)
            self._n_fruitless = 0 if is_better else self._n_fruitless + 1
            if grew:
                return True
        return (yield from self._admit([edit(parent, self._materials, self._rng)], parent, clients))

    def _count_wins(self) -> Steps[None]:
        """Ask all clients for the per-instance wins of the best of the pool, if that has grown."""
        if len(self._pool) == self._n_in_pool:
            return
        drafts = self._pool.best(self._method.n_frontier)
        templates = [draft.template() for draft in drafts]
        yield from self._session.ask(templates, None)
        weights, bias = self._session.pooled(templates)
        body = Wins(prompts=tuple(templates), stop=self._pool.stop, weights=weights, bias=bias)
        replies = yield from self._session.exchange("wins", dict.fromkeys(self._session.federation.clients, body))
        answers = picked(replies, Won, lambda won: len(won.shares) == len(drafts) and self._is_fair(won))
        shares: FloatArray = np.sum([won.shares for won in answers.values()], axis=0) if answers else np.zeros(0)
        if not shares.sum():  # nobody answered: all alike until somebody does
            shares = np.ones(len(drafts))
        else:
            self._n_in_pool = len(self._pool)
        self._wins = dict(zip(drafts, shares.tolist(), strict=True))

    def _is_fair(self, won: Won) -> bool:
        """No client has more than one win a text to give."""
        return won.n <= self._pool.stop and min(won.shares) >= 0 and sum(won.shares) <= won.n + 0.01

    def _draw(self) -> tuple[Draft, Draft | None]:
        """Two different parents in proportion to their wins; no second one where one prompt wins everything."""
        drafts, shares = [d for d in self._wins if self._wins[d]], [w for w in self._wins.values() if w]
        order = self._rng.choice(len(drafts), size=min(2, len(drafts)), replace=False, p=np.divide(shares, sum(shares)))
        return drafts[order[0]], drafts[order[1]] if len(order) > 1 else None

    def _admit(self, children: Sequence[Draft], parent: Draft, clients: Sequence[str]) -> Steps[bool]:
        """Have those ``children`` scored by all that are new, and strictly better than ``parent`` on the texts of
        ``clients``; whether there were any."""
        fresh = [child for child in children if child not in self._pool]
        family = [draft.template() for draft in (parent, *fresh)]
        if not fresh:
            return False
        try:
            standings = yield from self._session.score(family, singles(family), self._pool.stop, clients=clients)
        except RunError:  # these clients do not answer; others may, in the next step
            return False
        better = [child for child, standing in zip(fresh, standings[1:], strict=True) if standing.diff > 0]
        yield from self._pool.heat(better)
        return bool(better)


def gathering_cost(session: Session) -> int:
    """FM calls that `gather` makes at most, about."""
    share, least = gathering_needs(session.federation)
    return max(int(session.milestone * (share if session.federation.public else 2 * share)), least)
