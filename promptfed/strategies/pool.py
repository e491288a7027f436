"""Candidates with their standings, and how the better part of them is found on a part of the texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft, similarity
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Standing, Steps, singles
from promptfed.strategies.session import N_FINALISTS, Session

# Score that a draft gives up for being like one that is kept already: about two standard deviations between drafts.
DIVERSITY = 0.04
# Standard errors behind the leader at which a candidate is given up before its turn.
CONTENDERS = 3.0
# Score that a set gives up for being of drafts that are all alike: they make the same mistakes, which a choice by score
# on the few texts at hand sees too late.
LIKENESS = 0.04
# Drafts that go on to more texts before the finalists are chosen.
N_SECOND = 10


class Pool:
    """Drafts that were scored on texts [0, stop) of every client. Ties go to the one that came first."""

    def __init__(self, session: Session, stop: int) -> None:
        self._session, self.stop = session, stop
        self._entries: dict[Draft, Standing] = {}

    def __contains__(self, draft: Draft) -> bool:
        return draft in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, draft: Draft) -> Standing:
        return self._entries[draft]

    def heat(self, drafts: Sequence[Draft]) -> Steps[None]:
        """Score ``drafts`` and add them."""
        if not drafts:
            return
        prompts = [draft.template() for draft in drafts]
        standings = yield from self._session.score(prompts, singles(prompts), self.stop)
        self._entries |= zip(drafts, standings, strict=True)
        leader = self.best(1)[0]
        log_heat(self._session, len(drafts), leader.template(), self._entries[leader])

    def best(self, n: int) -> list[Draft]:
        return sorted(self._entries, key=lambda d: -self._entries[d].score)[:n]

    def diverse(self, n: int) -> list[Draft]:
        """`diverse` of the drafts scored so far."""
        return diverse({draft: standing.score for draft, standing in self._entries.items()}, n)

    def finalists(self, known: Sequence[Draft], max_calls: int) -> Steps[list[Draft]]:
        """Those that are ``known`` to be good and the better part of the pool, scored on more texts for ``max_calls``;
        of these the drafts of the best sets, best first. Where one prompt is wanted they are halved; a set may need one
        that does badly alone."""
        session = self._session
        survivors = distinct([*known, *self.diverse(N_SECOND)])[:N_SECOND]
        if session.federation.max_prompts == 1:
            return (yield from halved(session, survivors, max_calls, N_FINALISTS))
        stop = session.reach([draft.template() for draft in survivors], max_calls)
        return (yield from by_sets(session, survivors, stop))[:N_FINALISTS]


def log_heat(session: Session, n_candidates: int, leader: PromptTemplate, standing: Standing) -> None:
    """Tell the event log of a heat, and of the best prompt so far."""
    session.federation.log(
        "heat",
        {
            "fm_calls": session.spent,
            "n_candidates": n_candidates,
            "n_texts": standing.n,
            "best_score": standing.score,
            "best_prompt": leader.text,
            "best_words": list(leader.words),
        },
    )


def by_sets(session: Session, drafts: Sequence[Draft], stop: int) -> Steps[list[Draft]]:
    """``drafts`` in the order of the best sets that they are in, by their scores on texts [0, stop) of every client."""
    ranked = yield from session.rank_sets([d.template() for d in drafts], stop, lambda s: alike(drafts, s))
    return distinct([drafts[i] for s in ranked for i in s])


def halved(session: Session, drafts: Sequence[Draft], calls: int, n_final: int) -> Steps[list[Draft]]:
    """`halve` of the prompts of ``drafts``."""
    of = {draft.template(): draft for draft in drafts}
    kept = yield from halve(session, list(of), calls, n_final=n_final)
    return [of[prompt] for prompt in kept]


def concluded(session: Session, drafts: Sequence[Draft]) -> Steps[PromptSet]:
    """`Session.conclude` with ``drafts``, best first, where a set pays for their likeness."""
    return (yield from session.conclude([d.template() for d in drafts], penalty=lambda s: alike(drafts, s)))


def diverse(worth: Mapping[Draft, float], n: int) -> list[Draft]:
    """``n`` good drafts that are not alike, best first: each costs up to `DIVERSITY` for what it shares with one before
    it."""
    kept: list[Draft] = []
    left = sorted(worth, key=lambda d: -worth[d])
    while left and len(kept) < n:
        best = max(left, key=lambda d: worth[d] - DIVERSITY * max((similarity(d, k) for k in kept), default=0.0))
        left.remove(best)
        kept.append(best)
    return kept


def alike(drafts: Sequence[Draft], chosen: Sequence[int]) -> float:
    """What a set of ``drafts`` gives up for their likeness."""
    pairs = [similarity(drafts[i], drafts[j]) for i, j in combinations(chosen, 2)]
    return LIKENESS * float(np.mean(pairs or [0.0]))


def drawn(draw: Callable[[int], Draft], n: int, known: Pool) -> list[Draft]:
    """``n`` drafts that are new to ``known``, or fewer where no more are found; ``draw`` makes one, told how many there
    are so far."""
    drafts: list[Draft] = []
    for _ in range(20 * n):
        if len(drafts) >= n:
            break
        draft = draw(len(drafts))
        if draft not in known and draft not in drafts:
            drafts.append(draft)
    return drafts


def distinct(drafts: Sequence[Draft]) -> list[Draft]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(drafts))


def halve(
    session: Session, prompts: Sequence[PromptTemplate], calls: int, *, n_final: int = 1
) -> Steps[list[PromptTemplate]]:
    """The ``n_final`` best of ``prompts``, best first, for at most ``calls`` FM calls: successive halving (Jamieson &
    Talwalkar, AISTATS 2016, arXiv 1502.07943, section 2).

    Rounds cost about the same each; after each at least the worse half goes, and with it whoever is more than
    `CONTENDERS` standard errors of their paired difference behind the leader: what those would have cost goes to the
    rounds that follow.
    """
    alive, since = list(prompts), session.spent
    n_rounds = max(1, int(np.ceil(np.log2(max(len(alive), 1) / max(n_final, 1)))) + 1)
    for r in range(n_rounds):
        share = (calls - (session.spent - since)) // (n_rounds - r)
        stop = session.reach(alive, max(share, 0))
        if not stop:
            break
        standings = yield from session.score(alive, singles(alive), stop)
        order = sorted(range(len(alive)), key=lambda i: -standings[i].score)
        if r < n_rounds - 1:
            order = order[: max(n_final, (len(order) + 1) // 2)]
            # Differences are to the first of the round: to the leader's, both errors add up at most.
            best = standings[order[0]]
            near = [
                i for i in order if best.diff - standings[i].diff <= CONTENDERS * (best.diff_se + standings[i].diff_se)
            ]
            order = order[: max(n_final, len(near))]
        alive = [alive[i] for i in order]
        if len(alive) <= n_final and r >= n_rounds - 2:
            break
    return alive[:n_final]
