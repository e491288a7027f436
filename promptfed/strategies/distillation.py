"""The FM teaches the domain models: each client's learns what the FM says of the client's own unlabelled texts, and of
the public ones (Setting 1 of Ren et al., arXiv 2502.12176).

Public texts are dealt out among the clients, so that each is paid for once; what the FM says of them goes to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from promptfed.errors import RunError
from promptfed.messages import Distil, Distilled, Lessons, Teach, Votes
from promptfed.prompts.artefact import PromptSet
from promptfed.strategies.base import Federation, Round, Steps
from promptfed.strategies.exchanges import picked

# Of the calls, what goes into public texts at most.
PUBLIC_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What came of it: lessons a client, and over ``n`` labelled texts, none seen by the model that judged it, the mean
    score (1 - Brier/2) before and after, and the standard error of their difference."""

    n_lessons: Mapping[str, int]
    n: int
    before: float
    after: float
    error: float


def distil(
    federation: Federation,
    prompts: Mapping[str, PromptSet],
    max_fm_calls: int,
    *,
    temperature: float = 1.0,
    min_confidence: float = 0.9,
) -> Steps[Learned]:
    """Spend ``max_fm_calls`` at most on teaching. ``prompts``: what each client asks its FM with.

    A client's share goes by its unlabelled texts. Raises `RunError` if no client learned.
    """
    clients = sorted(set(prompts) & set(federation.clients))
    lessons, n_spent = yield from _public_lessons(federation, prompts, clients, int(max_fm_calls * PUBLIC_SHARE))
    n_texts = {c: federation.unlabelled.get(c, 0) for c in clients}
    left = max_fm_calls - n_spent
    wanted = sum(n * len(prompts[c].prompts) for c, n in n_texts.items())
    scale = min(1.0, left / wanted) if wanted else 0.0
    tasks, grants = {}, {}
    for c, n in n_texts.items():
        stop = int(n * scale)
        grants[c] = stop * len(prompts[c].prompts)
        tasks[c] = Distil(
            prompt=prompts[c],
            stop=stop,
            lessons=lessons,
            temperature=temperature,
            min_confidence=min_confidence,
        )
    replies = picked((yield Round(name="distil", tasks=tasks, grants=grants)), Distilled, lambda _: True)
    if not replies:
        raise RunError("no client learned from the FM; at least one is needed")
    n = sum(b.n for b in replies.values())
    before, after, squares = (
        sum(getattr(b, name) for b in replies.values()) for name in ("before", "after", "diff_sq")
    )
    mean = (after - before) / max(n, 1)
    variance = max(squares / max(n, 1) - mean**2, 0.0)
    learned = Learned(
        n_lessons={c: b.n_lessons for c, b in sorted(replies.items())},
        n=n,
        before=before / max(n, 1),
        after=after / max(n, 1),
        error=float(np.sqrt(variance / max(n, 1))),
    )
    federation.log(
        "distilled",
        {"n_lessons": dict(learned.n_lessons), "before": learned.before, "after": learned.after, "n": learned.n},
    )
    return learned


def _public_lessons(
    federation: Federation, prompts: Mapping[str, PromptSet], clients: list[str], max_fm_calls: int
) -> Steps[tuple[Lessons | None, int]]:
    """What the FM says of public texts, and the calls that it took."""
    if not federation.public or not clients:
        return None, 0
    prompt = prompts[clients[0]]
    n = min(len(federation.public), max_fm_calls // len(prompt.prompts))
    shares = {c: tuple(federation.public[i : n : len(clients)]) for i, c in enumerate(clients)}
    tasks = {c: Teach(prompt=prompt, texts=texts) for c, texts in shares.items() if texts}
    if not tasks:
        return None, 0
    grants = {c: len(task.texts) * len(prompt.prompts) for c, task in tasks.items()}
    n_labels = len(federation.labels)
    replies = picked((yield Round(name="teach", tasks=tasks, grants=grants)), Votes, lambda _: True)
    said = {c: body for c, body in sorted(replies.items()) if body.fits(len(shares[c]), n_labels)}
    texts = tuple(text for c in said for text in shares[c])
    return Lessons(texts=texts, shares=b"".join(body.shares for body in said.values())), sum(grants.values())
