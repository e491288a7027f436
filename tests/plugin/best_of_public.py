"""``best_of_public``: a few drafts with public texts as exemplars, all scored by every client, and the best kept.

An example of a method in a package of its own: the domain models vote which public texts show which label, so the
server needs no labels, and the drafts are scored on the clients' first texts. See docs/methods/README.md of promptfed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Card, Federation, Steps, singles
from promptfed.strategies.session import Session
from promptfed.types import Capability


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfPublic:
    """``n_drafts`` prompts a round, each with one public text a label, on ``n_texts`` texts a client."""

    n_drafts: int = 6
    n_texts: int = 5
    reserve: float = 0.4

    name: ClassVar[str] = "best_of_public"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE})
    card: ClassVar[Card] = Card(
        paper="an example: random search with domain models as labellers",
        sends=frozenset({"vote", "ask", "score", "newton"}),
        crosses="Votes on public texts, and sums of bounded scores.",
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation, reserve=self.reserve), federation.rng(1)
        best = [self._draft(federation, [])]
        votes = (yield from session.vote(federation.public)) if federation.public else np.zeros((0, 0))
        while True:
            drafts = [*best, *(self._draft(federation, picked(votes, rng)) for _ in range(self.n_drafts))]
            drafts = list(dict.fromkeys(drafts))
            cost = session.cost(drafts, self.n_texts)
            if not cost or not (yield from session.affords(cost, best)):  # nothing new, or nothing left
                break
            standings = yield from session.score(drafts, singles(drafts), self.n_texts)
            ranked = sorted(range(len(drafts)), key=lambda i: -standings[i].score)
            best = [drafts[i] for i in ranked[:4]]
        while True:  # milestones that nothing new was tried for are read as well
            prompt = yield from session.conclude(best)
            if session.is_over:
                return prompt

    def _draft(self, federation: Federation, shown: list[tuple[int, int]]) -> PromptTemplate:
        """A prompt with these (public text, label) as exemplars."""
        return Draft(
            instruction=federation.instruction,
            fields=("Text", "Label"),
            exemplars=tuple((federation.public[i], label) for i, label in shown),
            words=federation.words,
        ).template()


def picked(votes: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:  # type: ignore[type-arg]
    """For each label one public text, drawn among the five that the ``votes`` (n, K) are surest of."""
    if not len(votes):
        return []
    sure = np.argsort(-votes, axis=0, kind="stable")[:5]
    return [(int(rng.choice(sure[:, label])), label) for label in range(votes.shape[1])]
