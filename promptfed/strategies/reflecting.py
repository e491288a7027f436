"""How the methods of textual feedback ask clients to reflect: `fedtextgrad` and `fed_gepa`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from promptfed.messages.methods import Reflect, Reflected
from promptfed.prompts.feedback import MAX_KNOWN, read_instruction
from promptfed.prompts.grammar import Draft, bare_draft
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Federation, Steps
from promptfed.strategies.exchanges import picked
from promptfed.strategies.pool import Pool
from promptfed.strategies.proposal_answers import FIELDS, SHOWN
from promptfed.strategies.session import N_FINALISTS, Session

# In how many public texts a word must stand for clients to be told of it.
LEAST_TEXTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reflecting:
    """What is the same in every `Reflect` of a run."""

    n_examples: int
    n_steps: int
    max_tokens: int
    max_words: int
    known: tuple[str, ...]

    @property
    def cost(self) -> int:
        """FM calls that a client is granted, at most."""
        return Reflect.most_fm_calls(self.n_examples, self.n_steps)

    def reflect(
        self, session: Session, draft: Draft, clients: Sequence[str], *, start: int, seed: int
    ) -> Steps[dict[str, str]]:
        """Instructions that ``clients`` found better than that of ``draft`` on texts of their own, from number
        ``start`` on; none of a client that found none. ``draft`` has been scored before."""
        template = draft.template()
        yield from session.ask([template], None)  # no call: its calibration over all that it was scored on
        weights, bias = session.pooled([template])
        task = Reflect(
            template=template,
            instruction=draft.instruction,
            weight=weights[0],
            bias=bias,
            known=self.known,
            start=start,
            n_examples=self.n_examples,
            n_steps=self.n_steps,
            max_tokens=self.max_tokens,
            max_words=self.max_words,
            seed=seed,
        )
        grants = dict.fromkeys(clients, self.cost)
        replies = yield from session.exchange("reflect", dict.fromkeys(clients, task), grants)
        answers = picked(replies, Reflected, lambda _: True)
        # A client is not believed: what it sends has to be an instruction like any other.
        read = {c: read_instruction(body.instruction, self.max_words) for c, body in answers.items()}
        session.federation.log(
            "reflection",
            {
                "fm_calls": session.spent,
                "n_clients": len(clients),
                "n_better": sum(map(bool, read.values())),
                "n_stopped": sum(body.n_stopped for body in answers.values()),
            },
        )
        return {c: text for c, text in sorted(read.items()) if text and text != draft.instruction}


def first_draft(federation: Federation) -> Draft:
    """What a search begins with: the person's instruction, and an empty form; where answers are written, with the
    exemplars of what a short answer is, without which a small FM writes whole sentences whatever it is told."""
    if federation.labels:
        return bare_draft(federation.instruction, federation.words)
    return Draft(instruction=federation.instruction, fields=FIELDS[0], exemplars=(), words=(), pairs=SHOWN)


def best_of(pool: Pool, start: Draft, n: int = N_FINALISTS) -> list[PromptTemplate]:
    """The ``n`` best prompts so far that are not alike, best first; the start where none was scored yet."""
    return [draft.template() for draft in (pool.diverse(n) or [start])]


def next_in_turn(clients: Iterable[str], turns: Counter[str], n: int, rng: np.random.Generator) -> list[str]:
    """``n`` of ``clients`` whose turn came least often, at random among equals; counts them in ``turns``."""
    known = sorted(clients)
    order = [known[i] for i in rng.permutation(len(known))]
    chosen = sorted(sorted(order, key=lambda client: turns[client])[:n])
    turns.update(chosen)
    return chosen


def public_words(federation: Federation) -> tuple[str, ...]:
    """The most frequent words of the public texts, which no client's gate has to stop."""
    counts = Counter(w for text in federation.public for w in set(re.findall(r"[^\W\d_]{2,}", text.lower())))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(word for word in ranked if counts[word] >= LEAST_TEXTS)[:MAX_KNOWN]
