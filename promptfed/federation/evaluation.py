"""Rounds that are not tuning: joining, adopting the tuned prompt, FedAvg of heads, and measuring arms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from evaluators.metrics import METRICS
from promptfed.errors import RunError
from promptfed.messages import Adopt, Evaluate, Evaluated, FitHead, Head, Join, Joined, Stack
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, newton_step
from promptfed.strategies.base import MAX_TRIES, Replies, Round, Steps, T
from promptfed.strategies.session import sum_newton_parts

FEDAVG_ROUNDS = 10
# What a domain model's calibrated logits are worth beside the FM's, before anything is known: both make the same
# mistakes on hard texts, so they don't count in full.
STACK_START, STACK_STRENGTH, STACK_STEPS = (1.0, 0.5), 4.0, 3
Stack2 = tuple[float, float]


def join(clients: Sequence[str], task: Join) -> Steps[dict[str, Joined]]:
    """Ask every client what it holds."""
    replies = yield Round(name="join", tasks=dict.fromkeys(clients, task))
    return {c: r.body for c, r in replies.items() if isinstance(r.body, Joined)}


def fit_stack(clients: Sequence[str], prompt: PromptSet) -> Steps[Stack2]:
    """Weights of the FM's and the domain models' calibrated logits, one pair for all, by federated Newton steps.

    Two numbers from everybody's texts: fitted by each client on its few, they were worth half as much.
    """
    start = at = Calibration(weights=STACK_START, bias=())
    for _ in range(STACK_STEPS):
        body = Stack(prompt=prompt, weights=(at.weights[0], at.weights[1]))
        replies = yield Round(name="stack", tasks=dict.fromkeys(clients, body))
        total = sum_newton_parts(replies, len(STACK_START))
        if total is None:
            raise RunError("no client took part in weighing FM and domain models; at least one is needed")
        at = newton_step(total, at, start, STACK_STRENGTH)
    return at.weights[0], at.weights[1]


def adopt(clients: Sequence[str], prompt: PromptSet, stack: Stack2) -> Steps[None]:
    """Give every client the tuned prompt, to calibrate at home."""
    yield Round(name="adopt", tasks=dict.fromkeys(clients, Adopt(prompt=prompt, stack=stack)))


def fedavg_heads(clients: Sequence[str]) -> Steps[tuple[float, ...]]:
    """Federated averaging of the domain models' heads, weighted by texts (McMahan et al., AISTATS 2017, alg. 1)."""
    head: tuple[float, ...] = ()
    for _ in range(FEDAVG_ROUNDS):
        replies = yield Round(name="fedavg", tasks=dict.fromkeys(clients, FitHead(head=head)))
        parts = [r.body for r in replies.values() if isinstance(r.body, Head) and r.body.n]
        sizes = {len(head)} if head else {len(p.weights) for p in parts}
        parts = [p for p in parts if len(p.weights) == min(sizes, default=0)]
        if not parts:
            raise RunError("no client returned a head")
        head = tuple(np.average([p.weights for p in parts], axis=0, weights=[p.n for p in parts]).tolist())
    return head


def side_by_side(name: str, each: Mapping[str, Steps[T]]) -> Steps[dict[str, T]]:
    """A method for each client alone, in rounds that all share; by client, what it came to.

    A client that missed a round is asked the same once more; after `MAX_TRIES` in a row it is left out.
    """
    done: dict[str, T] = {}
    waiting: dict[str, Round] = {}
    missed = dict.fromkeys(each, 0)

    def go_on(client: str, replies: Replies | None) -> None:
        waiting.pop(client, None)
        try:
            waiting[client] = next(each[client]) if replies is None else each[client].send(replies)
        except StopIteration as end:
            done[client] = end.value

    for client in sorted(each):
        go_on(client, None)
    while waiting:
        replies = yield Round(
            name=name,
            tasks={c: round_.tasks[c] for c, round_ in waiting.items()},
            grants={c: round_.grants.get(c, 0) for c, round_ in waiting.items()},
        )
        for client in sorted(waiting):
            missed[client] = 0 if client in replies else missed[client] + 1
            if client in replies:
                go_on(client, {client: replies[client]})
            elif missed[client] == MAX_TRIES:
                del waiting[client]
    return done


def evaluate(
    tasks: Mapping[str, Evaluate], n_test: Mapping[str, int], metrics: Collection[str] = METRICS
) -> Steps[dict[str, Evaluated]]:
    """Measure one arm, by client; clients without held-out texts are left out, and replies without ``metrics``."""
    asked = {c: t for c, t in tasks.items() if n_test.get(c, 0)}
    if not asked:
        return {}
    prompts = {c: len(t.prompt.prompts) if t.prompt else 0 for c, t in asked.items()}
    grants = {c: n_test[c] * n for c, n in prompts.items()}
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
