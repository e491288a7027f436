"""``race``: propose many prompts, score them everywhere under calibration, halve, recombine, keep a diverse few.

promptfed's own method. Elimination on paired scores is successive halving (Jamieson & Talwalkar, AISTATS 2016, arXiv
1502.07943) with bounded sums from every client in place of one loss; the set is chosen by the score of the combined
answers (ensemble selection, Caruana et al., ICML 2004), which costs no FM call since clients keep the label scores that
they paid for. In order:

1. *Write*: the FM writes short texts of each label, in the style of the public pool where there is one.
2. *Vote*: the clients' domain models say which words and texts stand for which label; the FM says which are natural.
3. *Race*: drafts are scored on the clients' first few texts, the better part goes on to more texts, and survivors are
   recombined and edited between the heats.
4. *Choose*: finalists are scored on all the texts that the budget still pays for; the label words of the best set of
   ``max_prompts`` are weighed over all clients, and so are its prompts.

A candidate's score is 1 - Brier/2 under a calibration that was cross-fitted at the client, because that, and not raw
accuracy, is what the tuned prompt is worth after each client has calibrated it. In a generation task it is the token F1
of the answer, exemplars are what the FM answers to public texts (`proposal_answers`), and nobody votes or weighs words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft, Materials, crossover, draft_like, edit
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Card, Federation, Steps
from promptfed.strategies.open_pool import gather_alone
from promptfed.strategies.pool import N_SECOND, Pool, by_sets, concluded, distinct, drawn, halved
from promptfed.strategies.proposal import gather
from promptfed.strategies.session import N_FINALISTS, Session
from promptfed.types import Capability

# Shares of the calls up to the first milestone. Choosing and calibrating get what is left, two fifths.
FIRST_SHARE, VARY_SHARE, SECOND_SHARE = 0.26, 0.10, 0.22
# Share of the first drafts that are without exemplars, and of how many of the best the later ones take it. On train
# texts a set of three is best with one of them in it (sentiment5: 1 - Brier/2 .896, without .892), or made of them
# alone (topics6: .906 against .889).
BARE_SHARE, N_LEADERS, LEAST_AND_MOST = 1 / 3, 4, (0.25, 0.75)
# Of either kind, so many go on to more texts in any case.
N_BARE, N_SHOWN = 1, 2
# Texts, over all clients, that a finalist is asked about before more drafts are: on train texts of sentiment5 a set has
# an accuracy of .889 when calibrated on 100, .898 on 200 and .899 on 400.
ENOUGH_TEXTS = 200
# New drafts that are held against the finalists on all their texts.
N_NEWCOMERS = 2
# Texts, over all clients, that decide a first heat at least, where the budget is too small for more.
LEAST_TEXTS = 8
Later = Callable[[Session, Pool, list[Draft], Materials, np.random.Generator], Steps[tuple[Pool, list[Draft]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """The flagship method. ``first_texts``, over all clients, decide a heat: about 25 tell a hopeless prompt from a
    fair one. With a small budget it is fewer, so that there is a choice at all. Without ``domain_votes`` the FM alone
    says which words and texts stand for which label, which shows what the domain models add. With ``contrasts``, labels
    that the domain models confuse get exemplars that tell them apart."""

    first_texts: Annotated[int, Field(ge=1)] = 25
    domain_votes: bool = True
    contrasts: bool = False

    name: ClassVar[str] = "race"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE, Capability.TEXT})
    card: ClassVar[Card] = Card(
        paper="promptfed's own: successive halving (arXiv 1502.07943), ensemble selection (ICML 2004)",
        sends=frozenset({"write", "weigh", "vote", "ask", "score", "newton"}),
        crosses="Votes on public texts, and sums of bounded scores.",
        kinds=frozenset({"classification", "generation"}),
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        return (yield from self._race(Session(federation), federation.rng(1), self._later))

    def _race(self, session: Session, rng: np.random.Generator, later: Later) -> Steps[PromptSet]:
        """The whole of it; ``later`` gives the pool and the finalists of each milestone after the first."""
        n_clients = len(session.federation.clients)
        # Of three: with fewer there is nothing to choose.
        needed = int(np.ceil(3 * n_clients * max(1, round(LEAST_TEXTS / n_clients)) / FIRST_SHARE))
        session.require(needed, f"one round of {self.name} with {n_clients} clients")
        stop, n_new = heat_size(session.budget, n_clients, self.first_texts)
        materials = yield from self._materials(session, rng)
        pool = Pool(session, stop)
        finalists = yield from self._first(session, pool, n_new, materials, rng)
        while True:
            prompt = yield from concluded(session, finalists)
            if session.is_over:
                return prompt
            pool, finalists = yield from later(session, pool, finalists, materials, rng)

    def _materials(self, session: Session, rng: np.random.Generator) -> Steps[Materials]:
        votes = self.domain_votes or not session.federation.labels  # in a generation task nobody votes
        if not votes:
            return (yield from gather_alone(session, rng))
        return (yield from gather(session, rng, contrasts=self.contrasts))

    def _first(
        self, session: Session, pool: Pool, n_new: int, materials: Materials, rng: np.random.Generator
    ) -> Steps[list[Draft]]:
        """The finalists of the first milestone: of ``n_new`` drafts and what comes of varying the best of them."""
        budget = session.budget
        yield from heats(pool, n_new, lambda n: fresh(pool, materials, rng, n))
        n_vary = int(budget * VARY_SHARE) // (len(session.federation.clients) * pool.stop)
        yield from heats(pool, n_vary, lambda n: vary(pool.best(max(3, n_new // 4)), materials, rng, n, known=pool))
        # Some of either kind go on in any case: their mistakes are other ones, which counts in a set. Where answers are
        # written, nothing goes without exemplars.
        ranked = [draft for draft in pool.best(len(pool)) if draft.words]
        bare, shown = ([d for d in ranked if bool(d.exemplars) == has] for has in (False, True))
        known = [*bare[:N_BARE], *shown[:N_SHOWN]]
        return (yield from pool.finalists(known, min(int(budget * SECOND_SHARE), session.left)))

    def _later(
        self,
        session: Session,
        pool: Pool,
        finalists: list[Draft],
        materials: Materials,
        rng: np.random.Generator,
        n_gone: int = 0,
    ) -> Steps[tuple[Pool, list[Draft]]]:
        """The pool and the finalists of a later milestone: those of the one before, against new drafts, for the calls
        that the former can spare, less ``n_gone`` that went elsewhere."""
        n_clients = len(session.federation.clients)
        known = [draft.template() for draft in finalists]
        reached, since, calls = session.reach(known, 0), session.spent, spare_calls(session, known)
        calls = max(calls - n_gone, 0)
        if not calls or not reached:  # a client that never answered: there are no texts that all were asked about
            return pool, finalists
        stop, _ = heat_size(session.budget, n_clients, self.first_texts)
        best = distinct([*finalists, *pool.diverse(N_SECOND)])
        if stop > pool.stop and session.cost([draft.template() for draft in best], stop) <= calls // 4:
            # What led on very few texts may have been lucky.
            pool = Pool(session, stop)
            yield from pool.heat(best)
        n = max(calls // 2 - (session.spent - since), 0) // (n_clients * pool.stop)
        yield from heats(pool, n - n // 2, lambda k: fresh(pool, materials, rng, k))
        yield from heats(pool, n // 2, lambda k: vary(pool.best(max(3, n // 4)), materials, rng, k, known=pool))
        others = [draft for draft in pool.diverse(N_SECOND + len(finalists)) if draft not in finalists]
        kept = yield from halved(session, others, calls // 4, N_NEWCOMERS)
        while kept and session.cost([d.template() for d in kept], reached) > max(calls - (session.spent - since), 0):
            kept = kept[:-1]
        return pool, (yield from by_sets(session, [*finalists, *kept], reached))[:N_FINALISTS]


def heats(pool: Pool, n: int, draw: Callable[[int], list[Draft]]) -> Steps[None]:
    """Two heats of ``n`` drafts in all, the second drawn when the first is scored."""
    for part in (n - n // 2, n // 2):
        yield from pool.heat(draw(part))


def spare_calls(session: Session, finalists: Sequence[PromptTemplate]) -> int:
    """Calls up to the next milestone that ``finalists`` can spare for the search: half of what is left when they have
    been asked about `ENOUGH_TEXTS`, and all that is left when there is no text that they have not been asked about."""
    clients = session.federation.clients
    enough = session.cost(finalists, -(-ENOUGH_TEXTS // len(clients)))
    everything = session.cost(finalists, max(clients.values()))
    return max((session.budget - enough) // 2, session.budget - everything, 0)


def fresh(pool: Pool, materials: Materials, rng: np.random.Generator, n: int) -> list[Draft]:
    """``n`` drafts that are not in ``pool``, or fewer where no more are found. The first of all is the person's
    instruction alone; others are without exemplars about as often as the best of the pool are, but some of either kind
    always come: the best on few texts may be so by luck."""
    leaders = pool.best(N_LEADERS)
    share = np.clip(np.mean([not d.exemplars for d in leaders]), *LEAST_AND_MOST) if leaders else BARE_SHARE

    def draw(n_so_far: int) -> Draft:
        draft = draft_like(len(pool) + n_so_far, materials, rng)
        return settled(replace(draft, exemplars=()) if rng.random() < share else draft, materials)

    return drawn(draw, n, pool)


def settled(draft: Draft, materials: Materials) -> Draft:
    """``draft`` as it is scored: read off all words of each label, since `Session.verbalize` learns what each of them
    tells, for no call. Words that are shown nowhere tell no drafts apart: without exemplars they are the given ones."""
    draft = replace(draft, readout=materials.readout())
    return draft if draft.exemplars else replace(draft, words=materials.words)


def heat_size(budget: int, n_clients: int, n_texts: int) -> tuple[int, int]:
    """Texts a client, ``n_texts`` over all if the budget allows, and candidates of a first heat."""
    stop, least = (max(1, round(n / n_clients)) for n in (n_texts, LEAST_TEXTS))
    while stop > least and int(budget * FIRST_SHARE) // (n_clients * stop) < N_SECOND:
        stop -= 1
    return stop, int(budget * FIRST_SHARE) // (n_clients * stop)


def vary(parents: Sequence[Draft], materials: Materials, rng: np.random.Generator, n: int, known: Pool) -> list[Draft]:
    """``n`` new drafts: half crossovers of two parents, half edits of one; better parents are drawn more often."""
    rank = 1.0 / np.arange(1, len(parents) + 1)

    def draw(_: int) -> Draft:
        a, b = rng.choice(len(parents), size=2, p=rank / rank.sum())
        child = crossover(parents[a], parents[b], rng) if a != b else edit(parents[a], materials, rng)
        return settled(child, materials)

    return drawn(draw, n, known)
