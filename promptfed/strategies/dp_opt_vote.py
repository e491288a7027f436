"""``dp_opt_vote``: instructions written word by word by private votes. DP-OPT: Hong et al., ICLR 2024, arXiv
2312.03724.

1. *Vocabulary*: words of the person's instruction, of the labels, of instructions that the FM writes, and of what it
   expects with the labels (`open_pool`). No private text has a part in it.
2. *Write*: of the vocabulary, the FM's own favourites after what is written so far are the candidates. At each client,
   texts drawn by secret coins go into disjoint groups; each group's texts, with their labels, stand in a meta-prompt,
   and the FM says which candidate goes on. That is one vote a group. Clients add Gaussian noise to the histogram; the
   winner of the sum is written, if it has more votes than noise alone would give one of so many; or else the FM's
   favourite (the paper's algorithm 1: subsampled disjoint meta-prompts, token histogram, private top-1 in a limited
   domain with a threshold).
3. *Offer*: prompts with these instructions, and texts that the FM wrote as exemplars, are scored, and the best set is
   chosen and calibrated.

Words, so the instructions, are under differential privacy of a record; the scores of step 3 are exact sums, as in every
method, and outside of it (docs/privacy.md).

What differs: words for tokens, since clients may ask a model that shows no tokens. The paper's noise is Gumbel, whose
limited-domain top-1 (Durfee & Rogers, NeurIPS 2019, arXiv 1905.04273) needs one curator with all votes; here each
client adds its own, and the domain is public, so the threshold costs no privacy. The paper has a local model write and
a closed one answer; here one FM does both. It chooses among its prompts by an exponential mechanism on held-out texts;
promptfed's choice among candidates is the same for all methods, and not private.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from promptfed.messages.methods import NextWord
from promptfed.privacy.accounting import Release, epsilon_of, noise_multiplier_for, rounded_up
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft, likely_fields
from promptfed.prompts.meta import OPENING, next_word_request
from promptfed.strategies.base import Card, Federation, Steps
from promptfed.strategies.open_pool import (
    NOT_COVERED,
    Candidates,
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
from promptfed.strategies.proposal import N_EXEMPLARS, WRITE_SHARE
from promptfed.strategies.session import RESERVE, Session
from promptfed.types import Capability, FloatArray, TextRequest

# A text more at a client moves one group's vote from one word to another: sqrt(1 + 1).
SENSITIVITY = math.sqrt(2.0)
# Words that hold sentences together, whatever the task.
GLUE = ("the", "a", "of", "is", "it", "that", "text", "as", "or", "and", "whether", "if", "to", "which", "by", "its")
# An instruction shorter than this says nothing; one of these words may come back after so many others, others not.
LEAST_WORDS, REPEAT = 3, 4
# Instructions that the FM writes for their words, and words of a label that may stand in one.
N_WRITTEN, N_TELLING = 6, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOPTVote:
    """DP-OPT by votes of whole words.

    ``epsilon`` and ``delta`` hold for all votes together; an infinite epsilon is no noise and no claim. There are about
    ``n_groups`` groups over all clients, of ``group_size`` texts each on average. Up to each milestone, ``vote_share``
    of the calls go into at most ``n_instructions`` instructions of ``n_words`` words, each out of ``n_candidates``.
    """

    epsilon: Annotated[float, Field(gt=0)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    n_groups: Annotated[int, Field(ge=1)] = 15
    group_size: Annotated[int, Field(ge=1)] = 5
    n_words: Annotated[int, Field(ge=LEAST_WORDS)] = 8
    n_instructions: Annotated[int, Field(ge=1)] = 3
    n_candidates: Annotated[int, Field(ge=2)] = 10
    vote_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    reserve: Annotated[float, Field(ge=0, lt=1)] = RESERVE

    name: ClassVar[str] = "dp_opt_vote"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE, Capability.TEXT})
    card: ClassVar[Card] = Card(
        paper="DP-OPT: Hong et al., ICLR 2024, arXiv 2312.03724",
        sends=frozenset({"write", "weigh", "next_word", "ask", "score", "newton"}),
        crosses="Noised counts of groups of texts for the next word, out of public words; sums of bounded scores.",
        privacy_unit="record",
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation, reserve=self.reserve), federation.rng(1)
        ballot = self._ballot(federation)
        n_write = int(session.milestone * WRITE_SHARE) * (1 if federation.public else 2)
        spent = cost_of_gathering(federation, n_write) + N_WRITTEN + sum(ballot.plan[0]) * ballot.cost_of_a_word
        pool = Pool(session, texts_of_a_heat(session, self.name, spent))

        found = yield from gather_openly(session, rng, n_write)
        vocabulary = yield from self._vocabulary(session, found, rng)
        exemplars = [
            [*framed[:N_EXEMPLARS], *written[:N_EXEMPLARS]]
            for framed, written in zip(found.framed, found.written, strict=True)
        ]
        known, finalists = _Written(), list[Draft]()
        known.beginnings += [text.split()[0].lower() for text in shown_instructions(federation)]
        for lengths in ballot.plan:
            for n_words in lengths:
                written = yield from self._instruction(session, ballot, vocabulary, n_words, known)
                known.instructions += [written, f"{federation.instruction} {written}".strip()]
            if known.n_votes and ballot.noise and session.milestone == federation.max_fm_calls:
                federation.log("release", asdict(self._release(ballot, known)))
            materials = materials_of(federation, exemplars, instructions=list(dict.fromkeys(known.instructions)))
            finalists, prompt = yield from campaign(session, pool, finalists, drafts_of(materials, rng))
        return prompt

    def _ballot(self, federation: Federation) -> Ballot:
        """How it is voted, and how many words each instruction gets, up to each milestone."""
        n_texts = federation.n_train
        rate = min(1.0, self.n_groups * self.group_size / n_texts)
        groups = {c: max(1, round(self.n_groups * n / n_texts)) for c, n in federation.clients.items()}
        cost = 1 + sum(groups.values())
        ends = [*sorted({m for m in federation.milestones if 0 < m < federation.max_fm_calls}), federation.max_fm_calls]
        plan = []
        for start, end in zip([0, *ends], ends, strict=False):
            n_words = int(self.vote_share * (end - start)) // cost
            n = min(self.n_instructions, max(1, n_words // self.n_words))
            plan.append((min(self.n_words, n_words // n),) * n if n_words >= LEAST_WORDS else ())
        n_rounds = sum(map(sum, plan))
        multiplier = noise_multiplier_for(self.epsilon, self.delta, n_compositions=n_rounds, sampling_rate=rate)
        return Ballot(rate=rate, groups=groups, noise=rounded_up(multiplier * SENSITIVITY), plan=tuple(plan))

    def _vocabulary(self, session: Session, found: Candidates, rng: np.random.Generator) -> Steps[list[str]]:
        """Words that an instruction may be made of, each once; those with a full stop end it."""
        federation = session.federation
        shown = shown_instructions(federation)
        requests = [
            TextRequest(
                prompt="\n".join(f"{OPENING} {text}" for text in shown) + f"\n{OPENING}",
                max_tokens=24,
                temperature=0.9,
                top_p=0.95,
                seed=int(rng.integers(2**31)),
            )
            for _ in range(N_WRITTEN)
        ]
        texts = yield from session.write(requests)
        words = re.findall(r"(?<!\S)[^\W\d_][\w'-]*[.]?(?![^\s,;:])", " ".join([*shown, *texts]).lower())
        telling = [framed_word(text) for mine in found.framed for text in mine[:N_TELLING]]
        ends = [f"{word}." for word in federation.words]
        return list(dict.fromkeys([*federation.words, *ends, *GLUE, *telling, *words]))

    def _instruction(
        self, session: Session, ballot: Ballot, vocabulary: Sequence[str], n_words: int, known: _Written
    ) -> Steps[str]:
        """One instruction, word by word. It begins as none that is ``known``, or all would be alike."""
        federation, words = session.federation, list[str]()
        shown = shown_instructions(federation)
        fields = likely_fields(federation.instruction)[0]
        while len(words) < n_words and not (words and words[-1].endswith(".")):
            barred = [*words[-REPEAT:], *(w for w in words if w not in GLUE)] if words else known.beginnings
            may_end = len(words) + 1 >= LEAST_WORDS
            options = [w for w in vocabulary if w.rstrip(".") not in barred and (may_end or not w.endswith("."))]
            if not options:
                break
            opening = next_word_request((), fields, shown, " ".join(words), ())
            likely, _ = yield from session.weigh([opening.text], options)
            candidates = [options[i] for i in np.argsort(-likely[0], kind="stable")[: self.n_candidates]]
            tasks = {
                c: NextWord(
                    shown=shown,
                    written=" ".join(words),
                    fields=fields,
                    words=federation.words,
                    candidates=tuple(candidates),
                    sampling_rate=ballot.rate,
                    n_groups=ballot.groups.get(c, 1),
                    max_texts=2 * self.group_size,
                    noise=ballot.noise,
                    release=known.n_votes,
                )
                for c in federation.clients
            }
            grants = {c: task.n_groups for c, task in tasks.items()}
            replies = yield from session.exchange("next_word", tasks, grants)
            known.n_votes += 1
            known.n_outputs += len(candidates)
            words.append(
                elected(candidates, sum_votes(replies, len(candidates)), sum(grants.values()), ballot.noise, len(tasks))
            )
        if words:
            known.beginnings.append(words[0])
        text = " ".join(words).rstrip(".")
        return f"{text[:1].upper()}{text[1:]}." if text else ""

    def _release(self, ballot: Ballot, known: _Written) -> Release:
        noise = ballot.noise / SENSITIVITY
        epsilon = epsilon_of(noise, self.delta, n_compositions=known.n_votes, sampling_rate=ballot.rate)
        return Release(
            mechanism="Gaussian noise on the votes of Poisson-sampled groups of texts for the next word",
            unit="record",
            noise_multiplier=round(noise, 6),
            n_compositions=known.n_votes,
            sampling_rate=round(ballot.rate, 6),
            epsilon=round(epsilon, 4),
            delta=self.delta,
            n_outputs=known.n_outputs,
            not_covered=NOT_COVERED,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """``rate``: share of the texts that is drawn. ``groups`` a client. ``noise``: standard deviation on every count of
    a client. ``plan``: words of each instruction, by milestone."""

    rate: float
    groups: Mapping[str, int]
    noise: float
    plan: tuple[tuple[int, ...], ...]

    @property
    def cost_of_a_word(self) -> int:
        """FM calls: one for the candidates, one a group."""
        return 1 + sum(self.groups.values())


@dataclass(slots=True)
class _Written:
    """What was written and let out so far. ``n_outputs``: numbers that each client sent."""

    instructions: list[str] = field(default_factory=list)
    beginnings: list[str] = field(default_factory=list)
    n_votes: int = 0
    n_outputs: int = 0


def shown_instructions(federation: Federation) -> tuple[str, ...]:
    """What an instruction looks like: the person's own, if there is one, and one made of the label words."""
    made = f"Say whether the text is {' or '.join(federation.words)}."
    return (federation.instruction, made) if federation.instruction.strip() else (made,)


def elected(candidates: Sequence[str], votes: FloatArray, n_groups: int, noise: float, n_clients: int) -> str:
    """The candidate with most votes, or the first, the FM's favourite, where that many votes may be noise: not over the
    even share by what the largest of so many noises reaches."""
    spread = noise * math.sqrt(n_clients) * math.sqrt(2.0 * math.log(len(candidates)))
    return candidates[int(np.argmax(votes))] if votes.max() > n_groups / len(candidates) + spread else candidates[0]
