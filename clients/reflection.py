"""Textual feedback at a client: let the FM read its mistakes and rewrite the instruction; and who wins text by text.

One step of TextGrad (Yuksekgonul et al., arXiv 2406.07496) as FedTextGrad's clients take it (Chen et al., ICLR 2025,
arXiv 2502.19980, section 3), and GEPA's reflective mutation with its per-instance bests (Agrawal et al., arXiv
2507.19457, algorithms 1 and 2). Of the client's texts, those that went wrong are shown to the FM and to nobody else;
what it writes passes the leak gate before anything is done with it. Unlike in the papers, better is better under
calibration, by 1 - Brier/2, since that is what a prompt is worth here in the end; a rewrite has the calibration of the
prompt that it comes from, as the few texts at hand, chosen for being mistakes, can't tell its bias from its merit.
Where answers are written, better is a higher mean token F1, and the right answers are as private as the texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clients.data import client_rng
from clients.gate import LeakGate
from clients.scores import Said
from promptfed.messages.methods import Reflect, Reflected, Wins, Won
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.feedback import MAX_KNOWN, critique_prompt, read_instruction, rewrite_prompt, rewritten
from promptfed.types import FloatArray, IntArray, TextRequest

if TYPE_CHECKING:
    from clients.client import Client

# Texts that are shown at most, of those that went wrong; the others count in the comparison all the same.
MAX_MISTAKES = 4
# Of a batch whose answers are known beforehand, so much may be mistakes: a rewrite has to keep what is right, too.
MISTAKE_SHARE = 0.5
# By how much a mean score has to be higher to be higher: scores are sums of rounded numbers.
MARGIN = 1e-9


async def reflect(client: Client, task: Reflect) -> Reflected:
    """Do a `Reflect`, in at most `Reflect.most_fm_calls` calls; where nothing went wrong, none beyond the batch."""
    rng = client_rng(task.seed, client.client_id, 11)
    train, pooled = client.data.train, Calibration(weights=(task.weight,), bias=task.bias)
    rows, said = await _batch(client, task, pooled, rng)
    marks = client.scores.mark(task.template, said, rows, pooled)
    best, words = task.instruction, task.template.words
    gate: LeakGate | None = None
    n_stopped = 0
    for _ in range(task.n_steps):
        wrong = np.flatnonzero(marks.wrong)[:MAX_MISTAKES]
        if not len(wrong):
            break
        mistakes = [(train.texts[rows[i]], marks.right[i], marks.given[i]) for i in wrong]
        critique = await _write(client, critique_prompt(best, words, mistakes), task, rng)
        asked = rewrite_prompt(best, words, critique, task.max_words)
        new = read_instruction(await _write(client, asked, task, rng), task.max_words)
        if not new or new == best:
            continue
        if gate is None:
            # What the FM was asked is public but for the critique, which it wrote from private texts.
            known = [word for word in task.known[:MAX_KNOWN] if len(word.split()) == 1]
            public = [task.template.text, *words, *known, rewrite_prompt(task.instruction, words, "", 0)]
            gate = LeakGate([*train.texts, *train.answers], public)
        if not gate.passes(new):
            n_stopped += 1
            continue
        template = rewritten(task.template, task.instruction, new)
        fresh = client.scores.mark(template, await client.scores.hear(client.fm, template, rows), rows, pooled)
        if fresh.score > marks.score + MARGIN:
            best, marks = new, fresh
    return Reflected(instruction="" if best == task.instruction else best, n_stopped=n_stopped)


async def wins(client: Client, task: Wins) -> Won:
    """Do a `Wins`: a text's win is shared by the prompts whose score on it is the best."""
    bias = np.reshape(task.bias, (len(task.prompts), len(client.labels)))
    scores = np.array(
        [
            client.scores.proper_scores(
                [p], task.stop, Calibration(weights=(w,), bias=tuple(b.tolist())), beside=task.prompts
            )
            for p, w, b in zip(task.prompts, task.weights, bias, strict=True)
        ]
    )
    return Won(n=scores.shape[1], shares=tuple(shared_wins(scores).tolist()))


def shared_wins(scores: FloatArray) -> FloatArray:
    """Wins (J,) of J prompts by their scores (J, n): one a text, in equal parts to all that are the best on it."""
    if not scores.size:
        return np.zeros(len(scores))
    is_best = scores >= scores.max(axis=0) - MARGIN
    return np.asarray((is_best / is_best.sum(axis=0)).sum(axis=1))


async def _batch(client: Client, task: Reflect, pooled: Calibration, rng: np.random.Generator) -> tuple[IntArray, Said]:
    """Texts (n,) and what the prompt said to them.

    Where the prompt was scored on enough texts from ``task.start`` on, those answers are used, and up to half of
    the texts are mistakes; otherwise texts are drawn at random and asked about.
    """
    n_texts = len(client.data.train)
    n = min(task.n_examples, n_texts)
    said, rows = client.scores.said(task.template)
    free = rows >= task.start
    said, rows = said[free], rows[free]
    if len(rows) >= n:
        is_wrong = client.scores.mark(task.template, said, rows, pooled).wrong
        order = rng.permutation(len(rows))
        wrong, right = [i for i in order if is_wrong[i]], [i for i in order if not is_wrong[i]]
        half = int(np.ceil(MISTAKE_SHARE * n))
        taken = [*wrong[:half], *right, *wrong[half:]][:n]
        return rows[taken], said[taken]
    start = task.start if n_texts - task.start >= n else 0
    drawn = start + rng.choice(n_texts - start, size=n, replace=False)
    return drawn, await client.scores.hear(client.fm, task.template, drawn)


async def _write(client: Client, prompt: str, task: Reflect, rng: np.random.Generator) -> str:
    request = TextRequest(
        prompt=prompt,
        max_tokens=task.max_tokens,
        temperature=0.7,
        top_p=0.95,
        seed=int(rng.integers(2**31)),
        stop=("</instruction>", "\n\n\n"),
    )
    return (await client.fm.complete([request]))[0].text or ""
