"""Rounds that are not tuning: joining, adopting the tuned prompt, and measuring arms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from evaluators.metrics import METRICS
from promptfed.errors import RunError
from promptfed.federation.grouping import best_alike
from promptfed.messages import (
    Adopt,
    Adopted,
    Ask,
    Cascade,
    Choice,
    Evaluate,
    Evaluated,
    Join,
    Joined,
    MomentSums,
    Offer,
    Score,
    Scored,
    Stack,
)
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, flattened, newton_step, prior
from promptfed.strategies.base import Federation, Reading, Round, Steps, candidate_sets
from promptfed.strategies.exchanges import picked
from promptfed.strategies.session import sum_newton_parts

HALVES: tuple[Literal[0], Literal[1]] = (0, 1)
# What a domain model's calibrated logits are worth beside the FM's, before anything is known: both make the same
# mistakes on hard texts, so they don't count in full.
STACK_START, STACK_STRENGTH, STACK_STEPS = (1.0, 0.5), 4.0, 3
Stack2 = tuple[float, float]


def join(clients: Sequence[str], task: Join) -> Steps[dict[str, Joined]]:
    """Ask every client what it holds."""
    replies = yield Round(name="join", tasks=dict.fromkeys(clients, task))
    return {c: r.body for c, r in replies.items() if isinstance(r.body, Joined)}


def fit_stack(prompts: Mapping[str, PromptSet]) -> Steps[Stack2]:
    """Weights of the FM's and the domain models' calibrated logits, one pair for all, by federated Newton steps.
    ``prompts``: what each client was tuned to.

    Two numbers from everybody's texts: fitted by each client on its few, they were worth half as much.
    """
    start = at = Calibration(weights=STACK_START, bias=())
    for _ in range(STACK_STEPS):
        weights = at.weights[0], at.weights[1]
        replies = yield Round(name="stack", tasks={c: Stack(prompt=p, weights=weights) for c, p in prompts.items()})
        total = sum_newton_parts(replies, len(STACK_START))
        if total is None:
            raise RunError("no client took part in weighing FM and domain models; at least one is needed")
        at = newton_step(total, at, start, STACK_STRENGTH)
    return at.weights[0], at.weights[1]


def offers(federation: Federation, reading: Reading) -> Steps[dict[str, Offer]]:
    """What each client may choose for itself in place of the tuned set: sets of the reading's finalists, and which is
    best for clients like it. No FM call: clients have the scores that the tuned set was chosen by. The sets' label-free
    calibrations are over all texts that the finalists were scored on.

    Empty where there is nothing to choose from.
    """
    prompts = reading.finalists
    sets = candidate_sets(len(prompts), federation.max_prompts)
    if len(sets) < 2 or not federation.labels:
        return {}
    stops = {c: reading.of(c).stop for c in federation.clients}
    shape = (len(prompts), len(federation.labels))
    replies = yield Round(name="ask", tasks=dict.fromkeys(stops, Ask(prompts=prompts, stop=None)))
    sums = picked(replies, MomentSums, lambda b: (len(b.total), len(b.squares)) == (shape[0] * shape[1], shape[0]))
    if not (n := sum(b.n for b in sums.values())):
        return {}
    total = np.sum([np.reshape(b.total, shape) for b in sums.values()], axis=0)
    squares = np.sum([b.squares for b in sums.values()], axis=0)
    pooled = [prior(n, of[None], np.array([sq])) for of, sq in zip(total, squares, strict=True)]
    weights, bias = flattened(pooled)
    tasks = {
        c: Score(prompts=prompts, sets=tuple(sets), stop=stop, weights=weights, bias=bias) for c, stop in stops.items()
    }
    halves = []
    for half in HALVES:
        replies = yield Round(name="score", tasks={c: replace(task, half=half) for c, task in tasks.items()})
        halves.append(picked(replies, Scored, lambda b: b.n > 0 and len(b.total) == len(sets)))
    alike = best_alike(halves)
    return {c: Offer(score=task, alike=alike.get(c, ())) for c, task in tasks.items()}


def adopt(
    prompts: Mapping[str, PromptSet],
    stack: Stack2,
    offered: Mapping[str, Offer] | None = None,
    cascades: Mapping[str, Cascade] | None = None,
) -> Steps[dict[str, int]]:
    """Give every client the tuned prompt, to calibrate at home, with what is ``offered`` it besides and its
    cascade; how many clients chose what."""
    tasks = {
        c: Adopt(prompt=p, stack=stack, offer=(offered or {}).get(c), cascade=(cascades or {}).get(c))
        for c, p in prompts.items()
    }
    replies = yield Round(name="adopt", tasks=tasks)
    counts = Counter(r.body.choice for r in replies.values() if isinstance(r.body, Adopted))
    return {choice: counts[choice] for choice in get_args(Choice)}


def evaluate(
    tasks: Mapping[str, Evaluate], n_test: Mapping[str, int], metrics: Collection[str] = METRICS
) -> Steps[dict[str, Evaluated]]:
    """Measure one arm, by client; clients without held-out texts are left out, and replies without ``metrics``."""
    asked = {c: t for c, t in tasks.items() if n_test.get(c, 0)}
    if not asked:
        return {}
    grants = {}
    for client, task in asked.items():  # it may ask with any of the prompts that it may choose from
        prompts = [*(task.prompt.prompts if task.prompt else ()), *(task.offer.score.prompts if task.offer else ())]
        prompts += task.cascade.single.prompts if task.cascade else ()
        grants[client] = n_test[client] * len({p.prompt_id for p in prompts})
    arm = next(iter(asked.values())).arm
    replies = yield Round(name=f"evaluate {arm}", tasks=asked, grants=grants)
    return {
        c: r.body
        for c, r in replies.items()
        if isinstance(r.body, Evaluated) and r.body.values.keys() == r.body.errors.keys() == set(metrics)
    }


def summarise(arms: Mapping[str, Mapping[str, Evaluated]]) -> dict[str, Any]:
    """``{metric: {arm: {mean, ci95, by_client: {id: {value, n, ci95}}}}}``; means are over clients.

    Intervals are normal, from the clients' bootstrap standard errors: texts are the sample, clients are strata.
    """
    out: dict[str, Any] = {}
    for arm, by_client in arms.items():
        for metric in sorted({m for e in by_client.values() for m in e.values}):
            values = {c: e.values[metric] for c, e in by_client.items()}
            errors = {c: e.errors[metric] for c, e in by_client.items()}
            mean = float(np.mean(list(values.values())))
            error = float(np.sqrt(np.sum(np.square(list(errors.values())))) / len(errors))
            out.setdefault(metric, {})[arm] = {
                "mean": round(mean, 6),
                "ci95": _interval(mean, error),
                "by_client": {
                    c: {"value": round(values[c], 6), "n": e.n, "ci95": _interval(values[c], errors[c])}
                    for c, e in sorted(by_client.items())
                },
            }
    return out


def _interval(value: float, error: float) -> list[float]:
    return [round(value - 1.96 * error, 6), round(value + 1.96 * error, 6)]
