"""The FM teaches the domain models: each client's learns what the FM says of the client's own unlabelled texts, and of
the public ones (Setting 1 of Ren et al., arXiv 2502.12176).

Public texts are dealt out among the clients, so that each is paid for once; what the FM says of them goes to all. Where
the lessons make the domain models worse on labelled texts that they were not fitted on, they are taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from promptfed.errors import RunError
from promptfed.messages import Distil, Distilled, Lessons, Teach, Unlearn, Votes
from promptfed.prompts.artefact import PromptSet
from promptfed.strategies.base import Federation, Round, Steps
from promptfed.strategies.exchanges import picked

# Of the calls, what goes into public texts at most, unless nothing else can use them.
PUBLIC_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What came of it: lessons a client, and over ``n`` labelled texts, none seen by the model that judged it, the mean
    score (1 - Brier/2) before and after, and the standard error of their difference. ``kept``: whether the lessons
    were, which they are unless the score fell."""

    n_lessons: Mapping[str, int]
    n: int
    before: float
    after: float
    error: float

    @property
    def kept(self) -> bool:
        return self.after >= self.before


class Teacher:
    """Teaches, once or several times: what it has paid for, it does not ask again.

    ``temperature`` divides the FM's log-odds; what it is less sure of than ``min_confidence`` is no lesson. With
    ``spends_all``, calls that unlabelled texts can't use go into public ones, however many.
    """

    def __init__(self, *, temperature: float = 1.0, min_confidence: float = 0.9, spends_all: bool = False) -> None:
        self._temperature, self._min_confidence, self._spends_all = temperature, min_confidence, spends_all
        self._asked: dict[tuple[str, str], int] = {}  # (prompt_id, client) -> unlabelled texts
        self._said: dict[str, Lessons] = {}  # prompt_id -> what the FM says of public texts
        self._dealt: dict[str, int] = {}  # prompt_id -> public texts that were dealt out

    def distil(self, federation: Federation, prompts: Mapping[str, PromptSet], max_fm_calls: int) -> Steps[Learned]:
        """Spend ``max_fm_calls`` at most on teaching. ``prompts``: what each client asks its FM with.

        A client's share goes by the unlabelled texts that its prompt was not asked about yet. Raises `RunError` if no
        client learned.
        """
        clients = sorted(set(prompts) & set(federation.clients))
        asked = {c: self._asked.get((prompts[c].prompt_id, c), 0) for c in clients}
        more = {c: max(federation.unlabelled.get(c, 0) - asked[c], 0) for c in clients}
        wanted = sum(n * len(prompts[c].prompts) for c, n in more.items())
        for_public = int(max_fm_calls * PUBLIC_SHARE)
        if self._spends_all:
            for_public = max(for_public, max_fm_calls - wanted)
        left = max_fm_calls - (yield from self._ask_public(federation, prompts, clients, for_public))
        scale = min(1.0, left / wanted) if wanted else 0.0
        tasks, grants = {}, {}
        for c, n in more.items():
            grants[c] = int(n * scale) * len(prompts[c].prompts)
            tasks[c] = Distil(
                prompt=prompts[c],
                stop=asked[c] + int(n * scale),
                lessons=self._said.get(prompts[clients[0]].prompt_id),
                temperature=self._temperature,
                min_confidence=self._min_confidence,
            )
        replies = picked((yield Round(name="distil", tasks=tasks, grants=grants)), Distilled, lambda _: True)
        if not replies:
            raise RunError("no client learned from the FM; at least one is needed")
        self._asked |= {(prompts[c].prompt_id, c): tasks[c].stop for c in replies}
        learned = _summed(replies)
        told = {"n_lessons": dict(learned.n_lessons), "before": learned.before, "after": learned.after, "n": learned.n}
        federation.log("distilled", {**told, "kept": learned.kept})
        if not learned.kept:
            yield Round(name="unlearn", tasks=dict.fromkeys(replies, Unlearn()))
        return learned

    def _ask_public(
        self, federation: Federation, prompts: Mapping[str, PromptSet], clients: list[str], max_fm_calls: int
    ) -> Steps[int]:
        """Ask about public texts that were not dealt out yet; the calls that it took."""
        if not clients:
            return 0
        prompt, n_labels = prompts[clients[0]], len(federation.labels)
        start = self._dealt.get(prompt.prompt_id, 0)
        stop = min(len(federation.public), start + max_fm_calls // len(prompt.prompts))
        shares = {c: tuple(federation.public[start + i : stop : len(clients)]) for i, c in enumerate(clients)}
        tasks = {c: Teach(prompt=prompt, texts=texts) for c, texts in shares.items() if texts}
        if not tasks:
            return 0
        grants = {c: len(task.texts) * len(prompt.prompts) for c, task in tasks.items()}
        replies = picked((yield Round(name="teach", tasks=tasks, grants=grants)), Votes, lambda _: True)
        said = {c: body for c, body in sorted(replies.items()) if body.fits(len(shares[c]), n_labels)}
        known = self._said.get(prompt.prompt_id, Lessons(texts=(), shares=b""))
        texts = tuple(text for c in said for text in shares[c])
        shares_of = b"".join(body.shares for body in said.values())
        self._said[prompt.prompt_id] = Lessons(texts=known.texts + texts, shares=known.shares + shares_of)
        self._dealt[prompt.prompt_id] = stop
        return sum(grants.values())


def _summed(replies: Mapping[str, Distilled]) -> Learned:
    n = sum(b.n for b in replies.values())
    before, after, squares = (
        sum(getattr(b, name) for b in replies.values()) for name in ("before", "after", "diff_sq")
    )
    mean = (after - before) / max(n, 1)
    variance = max(squares / max(n, 1) - mean**2, 0.0)
    return Learned(
        n_lessons={c: b.n_lessons for c, b in sorted(replies.items())},
        n=n,
        before=before / max(n, 1),
        after=after / max(n, 1),
        error=float(np.sqrt(variance / max(n, 1))),
    )
