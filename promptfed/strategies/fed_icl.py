"""``fed_icl``: public texts that the clients label in turn, until they agree, are the exemplars of the prompt.

Fed-ICL (Wang, Wang, Huang, Wang, Yu, Yao, Lui & Zhou, "Federated In-Context Learning: Iterative Refinement for Improved
Answer Quality", ICML 2025, PMLR 267:64628-64654, arXiv 2506.07440). Each round, the server sends its queries with the
answers of the round before, C_k = {(q, a_k(q))}; a client lets the FM answer the queries with examples of its own and
C_k before its eyes; the server fuses the answers of the clients into a_{k+1}.

What differs from the paper, and why:

- The queries are not the test questions but public texts, and texts that the FM wrote; what is wanted is a prompt for
  any text. The fused answers make the exemplars of few-shot prompts, and those are scored by all clients.
- The first answers a_0 are the votes of the clients' domain models, which cost no FM call.
- An answer is label probabilities, and it is calibrated before it is fused: an FM that reads a few shots says one label
  too often, and by what it usually says (over the queries that this client was sent) its answer is taken off.
- Answers of all rounds are averaged: with one or two calls a query and round, the newest alone would be noise.
- With a small budget a query goes to some of the clients in a round, and to others in the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from promptfed.messages import Votes
from promptfed.messages.methods import Relabel
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import FRAMES, Draft, Materials, draft_like, draw_exemplars, random_draft
from promptfed.strategies.base import Card, Federation, Steps
from promptfed.strategies.exchanges import picked
from promptfed.strategies.pool import Pool, concluded, drawn
from promptfed.strategies.proposal import WRITE_SHARE, gather, odds_of
from promptfed.strategies.session import RESERVE, Session
from promptfed.types import Capability, FloatArray, IntArray

# Of how many of the best prompts so far new ones take fields and label words, half of the time.
N_PARENTS = 3
# With a small budget a heat is over fewer texts, down to so many over all clients, so that there are so many drafts.
LEAST_TEXTS, N_DRAFTS = 8, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class FedICL:
    """``n_rounds`` of relabelling up to each milestone, for ``relabel_share`` of its calls: ``n_queries`` public texts
    a label, with ``n_shots`` texts a label of the client's own and the context. The ``n_context`` most agreed-on texts
    a label are what a prompt shows up to ``max_exemplars`` a label of. A heat scores new prompts on ``texts_per_heat``
    texts over all clients; ``final_share`` of the calls go into those that are left in the end."""

    n_rounds: Annotated[int, Field(ge=1)] = 3
    relabel_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    n_queries: Annotated[int, Field(ge=1)] = 8
    n_shots: Annotated[int, Field(ge=0)] = 2
    n_context: Annotated[int, Field(ge=1)] = 4
    max_exemplars: Annotated[int, Field(ge=1)] = 2
    texts_per_heat: Annotated[int, Field(ge=1)] = 20
    final_share: Annotated[float, Field(ge=0, lt=1)] = 0.22
    reserve: Annotated[float, Field(gt=0, lt=1)] = RESERVE

    name: ClassVar[str] = "fed_icl"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE, Capability.TEXT})
    card: ClassVar[Card] = Card(
        paper="Wang et al., ICML 2025, arXiv 2506.07440",
        sends=frozenset({"write", "weigh", "vote", "relabel", "ask", "score", "newton"}),
        crosses="Votes on public texts: the domain models', and the FM's as it sees the client's own examples; and "
        "sums of bounded scores.",
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation, reserve=self.reserve), federation.rng(1)
        stop = self._first_stop(session)
        materials = yield from gather(session, rng)
        start = draft_like(0, materials, rng)
        queries = _queries(materials, self.n_queries)
        votes = (yield from session.vote(queries)) if queries else np.zeros((0, len(federation.labels)))
        answers = Answers(queries, votes)
        pool, finalists = Pool(session, stop), list[Draft]()
        while True:
            yield from self._search(session, pool, answers, materials, [*finalists, start], rng)
            calls = min(int(session.budget * self.final_share), session.left)
            finalists = yield from pool.finalists(finalists, calls)
            prompt = yield from concluded(session, finalists)
            if session.is_over:
                return prompt

    def _search(
        self,
        session: Session,
        pool: Pool,
        answers: Answers,
        materials: Materials,
        first: Sequence[Draft],
        rng: np.random.Generator,
    ) -> Steps[None]:
        """The rounds up to the next milestone: relabel, and score prompts of the new context."""
        n_clients, budget = len(session.federation.clients), session.budget
        n_calls = int(budget * self.relabel_share) // self.n_rounds
        held = int(budget * self.final_share)
        for left in range(self.n_rounds, 0, -1):
            yield from self._relabel(session, answers, materials, min(n_calls, session.search_left - held), rng)
            context = replace(materials, exemplars=answers.agreed(self.n_context))
            share = (session.search_left - held - (left - 1) * n_calls) // left
            n = share // (n_clients * pool.stop)
            drafts = [d for d in first if d not in pool][:n]
            drafts += self._prompts(context, pool, rng, n - len(drafts))
            yield from pool.heat(drafts)
            session.federation.log(
                "context",
                {
                    "fm_calls": session.spent,
                    "exemplars": dict(zip(session.federation.labels, map(list, context.exemplars), strict=True)),
                    "n_changed": answers.n_changed,
                },
            )

    def _relabel(
        self, session: Session, answers: Answers, materials: Materials, n_calls: int, rng: np.random.Generator
    ) -> Steps[None]:
        """Let the clients answer ``n_calls`` of the queries, each with the context as it stands."""
        federation = session.federation
        order = [list(federation.clients)[i] for i in rng.permutation(len(federation.clients))]
        dealt = answers.deal(order, n_calls)
        if not dealt:
            return
        fields = materials.fields[0]
        context = tuple((t, k) for k, texts in enumerate(answers.agreed(1)) for t in texts)
        seed = int(rng.integers(2**31))
        tasks = {
            c: Relabel(
                texts=tuple(answers.queries[i] for i in mine),
                context=context,
                instruction=federation.instruction,
                fields=fields,
                words=federation.words,
                n_shots=self.n_shots,
                seed=seed,
            )
            for c, mine in dealt.items()
        }
        replies = yield from session.exchange("relabel", tasks, {c: len(mine) for c, mine in dealt.items()})
        n_labels = len(federation.labels)
        said = picked(replies, Votes, lambda _: True)
        answers.fuse(dealt, {c: body.proba for c, body in said.items() if body.fits(len(dealt[c]), n_labels)})

    def _prompts(self, context: Materials, pool: Pool, rng: np.random.Generator, n: int) -> list[Draft]:
        """``n`` new few-shot prompts of the context: which of its texts, how many and in what order is drawn; fields
        and words are drawn too, or those of one of the best so far."""
        parents = pool.best(N_PARENTS)

        def draw(_: int) -> Draft:
            draft = random_draft(context, rng)
            if parents and rng.random() < 0.5:
                parent = parents[int(rng.integers(len(parents)))]
                draft = replace(draft, fields=parent.fields, words=parent.words, readout=parent.readout)
            return replace(draft, exemplars=draw_exemplars(context, int(rng.integers(self.max_exemplars)) + 1, rng))

        return drawn(draw, n, pool)

    def _first_stop(self, session: Session) -> int:
        """Texts a client of a heat. Raises `ConfigError` where the budget pays for no choice of prompts."""
        n_clients = len(session.federation.clients)
        stop, least = (max(1, round(n / n_clients)) for n in (self.texts_per_heat, LEAST_TEXTS))
        share = 1 - self.reserve - self.final_share - self.relabel_share - WRITE_SHARE
        while stop > least and session.budget * share < N_DRAFTS * n_clients * stop:
            stop -= 1
        n_written = len(session.federation.labels) + len(FRAMES)
        needed = int(np.ceil((self.n_rounds * n_clients * min(stop, least) + n_written) / max(share, 0.01)))
        what = f"{self.n_rounds} rounds of fed_icl with {n_clients} clients"
        session.require(needed, what)
        return stop


class Answers:
    """The queries and what is thought of their labels: calibrated log-odds, (n, K), summed over who was asked.

    ``votes`` (n, K) are the first answers.
    """

    def __init__(self, queries: Sequence[str], votes: FloatArray) -> None:
        self.queries = tuple(queries)
        self._total, self._n = odds_of(votes), np.ones(len(queries), dtype=np.int64)
        self._asked: dict[str, IntArray] = {}  # client -> how often it was sent each query
        self._first = self._total.argmax(axis=1)

    @property
    def odds(self) -> FloatArray:
        """(n, K)."""
        return np.asarray(self._total / self._n[:, None])

    @property
    def n_changed(self) -> int:
        """Queries whose label is not the first one any more."""
        return int((self.odds.argmax(axis=1) != self._first).sum())

    def deal(self, clients: Sequence[str], n_calls: int) -> dict[str, list[int]]:
        """Up to ``n_calls`` pairs of client and query: who has seen a query least is sent it, clients in turn."""
        n = len(self.queries)
        for c in clients:
            self._asked.setdefault(c, np.zeros(n, dtype=np.int64))
        share = min(max(n_calls, 0) // max(len(clients), 1), n)
        dealt = dict[str, list[int]]()
        load = self._n.copy()
        for c in clients if share else ():
            # Those that it has seen least, then those that were answered least; then the order of the queries.
            mine = np.lexsort((np.arange(n), load, self._asked[c]))[:share]
            load[mine] += 1
            self._asked[c][mine] += 1
            dealt[c] = [int(i) for i in mine]
        return dealt

    def fuse(self, dealt: Mapping[str, Sequence[int]], votes: Mapping[str, FloatArray]) -> None:
        """Add each client's ``votes`` (n_dealt, K), less what is usual for the label in that client's reply."""
        for client, given in votes.items():
            rows = list(dealt[client])
            if len(rows) > 1:  # of a single answer nothing is left
                self._total[rows] += odds_of(given)
                self._n[rows] += 1

    def agreed(self, n: int) -> tuple[tuple[str, ...], ...]:
        """For each label, up to ``n`` queries that have it, by how clearly, best first."""
        odds = self.odds
        n_labels = odds.shape[1]
        top = np.sort(odds, axis=1)
        margin = top[:, -1] - top[:, -2]
        label = odds.argmax(axis=1)
        order = np.argsort(-margin, kind="stable")
        ranked = [[self.queries[i] for i in order if label[i] == k and margin[i] > 0] for k in range(n_labels)]
        return tuple(tuple(texts[:n]) for texts in ranked)


def _queries(materials: Materials, n: int) -> list[str]:
    """Up to ``n`` public texts a label by the first answers: exemplars of the shared pool and whole texts in turn, so
    that there are of both."""
    queries = dict[str, None]()
    for framed, loose in zip(materials.exemplars, materials.loose, strict=True):
        mine = [*dict.fromkeys([*framed[: max(n - len(loose), (n + 1) // 2)], *loose])]
        queries |= dict.fromkeys(mine[:n])
    return list(queries)
