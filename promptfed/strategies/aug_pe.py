"""``aug_pe``: exemplars evolve by private votes. Augmented Private Evolution: Xie, Lin et al., ICML 2024, arXiv
2403.01749.

1. *Start*: public texts and texts that the FM writes for each label (`open_pool`); no private text has a part in them.
2. *Vote*: each private text votes for the nearest candidate, under its own label (the paper's nearest-neighbour
   histogram, with Gaussian noise on each count). Each client adds the noise itself.
3. *Select* by rank, and let the FM *vary* the winners: texts like those (their VARIATION_API). Vote again, ``n_rounds``
   times in all.
4. *Offer*: prompts with a winner of each label as exemplars are scored, and the best set is chosen and calibrated.

Votes and what comes of them (which texts stand in prompts) are under differential privacy of a record; the scores of
step 4 are exact sums, as in every method, and outside of it (docs/privacy.md).

What differs: the paper makes a data set of thousands of synthetic texts to train a model on; here a handful of
exemplars is wanted, so the candidates are few, and votes many for each. There, a text votes among the candidates of its
label; here among all, under its label, so that the votes say which label a candidate shows: a public text has none, and
what a small FM writes for one may well show another. A candidate's worth for a label is its share of that label's votes
less the largest of another's, so that those near to everything do not win. Noise is drawn at the clients: there is
nobody to trust with the exact sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from promptfed.messages.methods import NearestVotes
from promptfed.privacy.accounting import Release, epsilon_of, noise_multiplier_for
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft
from promptfed.strategies.base import Card, Federation, Steps
from promptfed.strategies.open_pool import (
    NOT_COVERED,
    campaign,
    cost_of_gathering,
    drafts_of,
    framed_word,
    gather_openly,
    materials_of,
    sum_votes,
    texts_of_a_heat,
)
from promptfed.strategies.pool import Pool
from promptfed.strategies.proposal import WRITE_SHARE, clean_texts
from promptfed.strategies.session import RESERVE, Session
from promptfed.types import Capability, FloatArray, TextRequest

# Winners that the FM sees when it writes more like them, and words that join a label's own.
N_SHOWN, N_LABEL_WORDS = 4, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AugPE:
    """Private Evolution of exemplars.

    ``epsilon`` and ``delta`` hold for the votes of ``n_rounds`` together; an infinite epsilon is no noise and no claim.
    ``n_public`` public texts at most are candidates, ``n_winners`` a label go on, ``vary_share`` of the calls up to the
    first milestone go into a round of variations.
    """

    epsilon: Annotated[float, Field(gt=0)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    n_rounds: Annotated[int, Field(ge=1)] = 3
    n_public: Annotated[int, Field(ge=0)] = 40
    n_winners: Annotated[int, Field(ge=1)] = 6
    vary_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    reserve: Annotated[float, Field(ge=0, lt=1)] = RESERVE

    name: ClassVar[str] = "aug_pe"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE, Capability.TEXT})
    card: ClassVar[Card] = Card(
        paper="Augmented Private Evolution: Xie, Lin et al., ICML 2024, arXiv 2403.01749",
        sends=frozenset({"write", "weigh", "nearest_votes", "ask", "score", "newton"}),
        crosses="Noised counts of the texts that are nearest to public or FM-written ones; sums of bounded scores.",
        privacy_unit="record",
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation, reserve=self.reserve), federation.rng(1)
        n_write = int(session.milestone * WRITE_SHARE) * (1 if federation.public else 2)
        n_vary = max(1, int(session.milestone * self.vary_share) // len(federation.words))
        spent = cost_of_gathering(federation, n_write) + (self.n_rounds - 1) * n_vary * len(federation.words)
        pool = Pool(session, texts_of_a_heat(session, self.name, spent))
        noise = noise_multiplier_for(self.epsilon, self.delta, n_compositions=self.n_rounds)

        found = yield from gather_openly(session, rng, n_write)
        public = [found.public[i] for i in rng.permutation(len(found.public))[: self.n_public]]
        texts = [*(text for mine in (*found.framed, *found.written) for text in mine), *public]
        n_outputs, winners = 0, list[list[str]]()
        for number in range(self.n_rounds):
            if number:
                fresh = yield from self._variations(session, winners, n_vary, rng)
                texts = [*(text for mine in winners for text in mine), *fresh]
            texts = list(dict.fromkeys(texts))
            votes = yield from private_votes(session, texts, noise, number)
            n_outputs += votes.size
            winners = ranked(texts, votes, self.n_winners)
        if noise:
            federation.log("release", asdict(self._release(noise, n_outputs)))

        other_words = words_of(winners, found.framed, federation.words)
        federation.log(
            "materials",
            {"exemplars": dict(zip(federation.labels, winners, strict=True)), "words": list(map(list, other_words))},
        )
        drafts = drafts_of(materials_of(federation, winners, other_words), rng)
        finalists: list[Draft] = []
        while True:
            finalists, prompt = yield from campaign(session, pool, finalists, drafts)
            if session.is_over:
                return prompt

    def _variations(
        self, session: Session, winners: Sequence[Sequence[str]], n: int, rng: np.random.Generator
    ) -> Steps[list[str]]:
        """``n`` texts a label that the FM wrote after the winners, without those that can't be used."""
        words = session.federation.words
        requests = [
            TextRequest(
                prompt=f"Very short texts, all of them clearly {word}:\n"
                + "".join(f"- {mine[i]}\n" for i in rng.permutation(len(mine))[:N_SHOWN])
                + "-",
                max_tokens=12,
                temperature=0.9,
                top_p=0.95,
                seed=int(rng.integers(2**31)),
            )
            for word, mine in zip(words, winners, strict=True)
            for _ in range(n)
        ]
        return clean_texts((yield from session.write(requests)), words)

    def _release(self, noise: float, n_outputs: int) -> Release:
        return Release(
            mechanism="Gaussian noise on the votes of texts for their nearest candidates",
            unit="record",
            noise_multiplier=noise,
            n_compositions=self.n_rounds,
            sampling_rate=1.0,
            epsilon=round(epsilon_of(noise, self.delta, n_compositions=self.n_rounds), 4),
            delta=self.delta,
            n_outputs=n_outputs,
            not_covered=NOT_COVERED,
        )


def private_votes(session: Session, texts: Sequence[str], noise: float, number: int) -> Steps[FloatArray]:
    """The clients' noised votes on ``texts``, summed, shape (n_labels, n_texts)."""
    task = NearestVotes(texts=tuple(texts), noise=noise, release=number)
    replies = yield from session.exchange("nearest_votes", dict.fromkeys(session.federation.clients, task))
    n_labels = len(session.federation.labels)
    return sum_votes(replies, n_labels * len(texts)).reshape(n_labels, len(texts))


def ranked(texts: Sequence[str], votes: FloatArray, n: int) -> list[list[str]]:
    """For each label, the up to ``n`` texts that are worth most to it: their share of its votes less the largest that
    they have of another label's. ``votes`` (n_labels, n_texts)."""
    share = np.maximum(votes, 0.0)
    share /= np.maximum(share.sum(axis=1, keepdims=True), 1.0)
    worth = [share[k] - np.delete(share, k, axis=0).max(axis=0) for k in range(len(votes))]
    return [[texts[i] for i in np.argsort(-mine, kind="stable")[:n] if mine[i] > 0] for mine in worth]


def words_of(
    winners: Sequence[Sequence[str]], framed: Sequence[Sequence[str]], taken: Sequence[str]
) -> list[tuple[str, ...]]:
    """Words of each label whose ``framed`` texts won, best first: more label words, none of them ``taken``."""
    known = {text for mine in framed for text in mine}
    won = [list(dict.fromkeys(framed_word(text) for text in mine if text in known)) for mine in winners]
    return [tuple(word for word in words if word not in taken)[:N_LABEL_WORDS] for words in won]
