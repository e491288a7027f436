"""``fedtextgrad``: clients rewrite the shared instruction from their mistakes, the server merges what they wrote.

Chen et al., "Can Textual Gradient Work in Federated Learning?" (FedTextGrad, ICLR 2025, arXiv 2502.19980), on TextGrad
(Yuksekgonul et al., arXiv 2406.07496). A round: a few clients reflect on the shared prompt (`clients.reflection`), the
server makes one instruction of theirs (``merge``), and the next round starts from that.

What differs, and why. The paper takes every merge; here a merge has to win a vote of all clients, on texts that no
reflection has read, since a merge is often worse than what went into it (the paper's own finding, and the reason for
its "uniform information density"). The clients' instructions stand for election beside the merge as they are
(``n_singles``), so that a model that summarises badly costs a few calls and not the round. ``structured`` is a merge
without an FM: rules, and how many clients gave each. Whatever a client sends has passed its leak gate, and the FM is
shown nothing else when it merges. Where answers are written, the prompt also shows
what a short answer is (`first_draft`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.feedback import merge_prompt, read_instruction, sentences
from promptfed.prompts.grammar import Draft
from promptfed.strategies.base import Card, Federation, Steps
from promptfed.strategies.pool import Pool
from promptfed.strategies.reflecting import Reflecting, best_of, first_draft, next_in_turn, public_words
from promptfed.strategies.session import RESERVE, Session
from promptfed.types import Capability, TextRequest

# Two rules that share so much of their words are one.
SAME_RULE = 0.6
# How often a merge is written; the first that can be read is taken. By two clients, as one may be away.
N_MERGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One sentence of an instruction, and the clients that gave it."""

    text: str
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FedTextGrad:
    """``n_reflecting`` clients a round reflect (0: all), ``n_steps`` steps on ``n_examples`` texts each; a vote is over
    about ``n_texts`` texts of all clients together. After ``patience`` rounds without a better prompt the
    search ends, and what is left goes into reading."""

    merge: Literal["concat", "summarise", "uid", "structured"] = "uid"
    n_reflecting: int = 3
    n_examples: int = 4
    n_steps: int = 1
    n_singles: int = 1
    n_texts: int = 25
    max_words: int = 60
    max_tokens: int = 90
    patience: int = 6
    reserve: float = RESERVE

    name: ClassVar[str] = "fedtextgrad"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE, Capability.TEXT})
    card: ClassVar[Card] = Card(
        paper="FedTextGrad (ICLR 2025, arXiv 2502.19980), TextGrad (arXiv 2406.07496)",
        sends=frozenset({"reflect", "write", "ask", "score", "newton"}),
        crosses="Instructions that the FM wrote from a client's mistakes, past the leak gate; sums of bounded scores.",
        reads_text=True,
        kinds=frozenset({"classification", "generation"}),
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation, reserve=self.reserve), federation.rng(1)
        pool = Pool(session, max(1, round(self.n_texts / len(federation.clients))))
        start = first_draft(federation)
        incumbent, n_idle, turns = start, 0, Counter[str]()
        reflecting = Reflecting(
            n_examples=self.n_examples,
            n_steps=self.n_steps,
            max_tokens=self.max_tokens,
            max_words=self.max_words,
            known=public_words(federation),
        )
        while n_idle < self.patience:
            n_new = 1 + self.n_singles + (incumbent not in pool)
            clients = next_in_turn(federation.clients, turns, self.n_reflecting or len(federation.clients), rng)
            cost = len(clients) * reflecting.cost + N_MERGES + n_new * pool.stop * len(federation.clients)
            if not (yield from session.affords(cost, best_of(pool, start))):
                break
            if incumbent not in pool:
                yield from pool.heat([incumbent])
            seed = int(rng.integers(2**31))
            given = yield from reflecting.reflect(session, incumbent, clients, start=pool.stop, seed=seed)
            candidates = yield from self._candidates(session, incumbent, given, pool, seed)
            n_idle += 1
            if not candidates:
                continue
            yield from pool.heat([incumbent, *candidates])
            leader = max(candidates, key=lambda draft: pool[draft].diff)
            if pool[leader].diff > 0:
                incumbent, n_idle = leader, 0
        while True:
            prompt = yield from session.conclude(best_of(pool, start))
            if session.is_over:
                return prompt

    def _candidates(
        self, session: Session, incumbent: Draft, given: Mapping[str, str], pool: Pool, seed: int
    ) -> Steps[list[Draft]]:
        """What stands for election: the merge first, then single instructions, most clients first."""
        texts = list(dict.fromkeys(given.values()))
        if not texts:
            return []
        merged = texts[0] if len(texts) == 1 else (yield from self._merged(session, incumbent, given, seed))
        by_support = sorted(texts, key=lambda text: -list(given.values()).count(text))
        drafts = [replace(incumbent, instruction=text) for text in [merged, *by_support] if text]
        fresh = [draft for draft in dict.fromkeys(drafts) if draft not in pool]
        return fresh[: 1 + self.n_singles]

    def _merged(self, session: Session, incumbent: Draft, given: Mapping[str, str], seed: int) -> Steps[str]:
        """One instruction of those that the clients gave; "" where the FM wrote none."""
        if self.merge == "concat":
            return concatenated(list(dict.fromkeys(given.values())), self.max_words)
        if self.merge == "structured":
            rules = ranked_rules(given)
            provenance = [{"rule": rule.text, "clients": list(rule.clients)} for rule in rules]
            session.federation.log("rules", {"fm_calls": session.spent, "rules": provenance})
            return concatenated([rule.text for rule in rules], self.max_words)
        prompt = merge_prompt(list(dict.fromkeys(given.values())), incumbent.words, self.merge, self.max_words)
        request = TextRequest(
            prompt=prompt,
            max_tokens=self.max_tokens,
            temperature=0.7,
            top_p=0.95,
            seed=seed,
            stop=("</instruction>", "\n\n\n"),
        )
        written = yield from session.write([replace(request, seed=seed + i) for i in range(N_MERGES)])
        return next((read for text in written if (read := read_instruction(text, self.max_words))), "")


def concatenated(parts: Sequence[str], max_words: int) -> str:
    """As many of ``parts``, from the first on, as ``max_words`` hold; the first in any case."""
    kept = [parts[0]]
    for part in parts[1:]:
        if sum(len(p.split()) for p in [*kept, part]) <= max_words:
            kept.append(part)
    ended = [part if part[-1] in ".!?:" else f"{part}." for part in kept]
    return " ".join(ended)


def ranked_rules(given: Mapping[str, str]) -> list[Rule]:
    """The sentences of the clients' instructions, alike ones (`SAME_RULE`) as one in the words of the first; those of
    most clients first, then in the order in which they came."""
    rules: list[Rule] = []
    for client, instruction in given.items():
        for text in sentences(instruction):
            same = next((i for i, rule in enumerate(rules) if _likeness(rule.text, text) >= SAME_RULE), None)
            if same is None:
                rules.append(Rule(text=text, clients=(client,)))
            elif client not in rules[same].clients:
                rules[same] = replace(rules[same], clients=(*rules[same].clients, client))
    return sorted(rules, key=lambda rule: -len(rule.clients))


def _likeness(a: str, b: str) -> float:
    """Share of the words of both that are words of each (Jaccard)."""
    one, other = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return len(one & other) / max(len(one | other), 1)
