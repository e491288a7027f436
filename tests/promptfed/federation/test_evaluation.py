"""Rounds around tuning: joining, adopting, measuring and summing up."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators.metrics import METRICS
from promptfed.errors import RunError
from promptfed.federation.evaluation import (
    evaluate,
    fit_stack,
    join,
    summarise,
)
from promptfed.messages import Evaluate, Evaluated, Failed, Joined, NewtonPart, Reply, Stack, Train, Trained
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import NewtonSums
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import MAX_TRIES, Round, Steps
from promptfed.strategies.baselines import side_by_side
from tests.support import JOIN, finish, replies

PROMPT = PromptSet(
    labels=("bad", "good"),
    prompts=(PromptTemplate(text="Review: {text}\nLabel:", words=("bad", "good")),),
    weights=(1.0,),
    bias=(0.0, 0.0),
)


def evaluated(value: float, error: float = 0.0, n: int = 10) -> Evaluated:
    return Evaluated(n=n, values={"accuracy": value}, errors={"accuracy": error}, calls_per_prediction=1.0)


def test_join_asks_everybody_and_keeps_those_who_joined() -> None:
    joined = Joined(fm="m", encoder="e", capabilities=(), n_train=3, n_test=0, labels=("x",), n_dropped=1)

    (sent,), got = finish(join(["a", "b"], JOIN), lambda _: replies({"a": joined, "b": Failed(reason="E")}))

    assert sent.tasks == {"a": JOIN, "b": JOIN}
    assert got == {"a": joined}


def test_weights_of_fm_and_domain_models_are_found_from_sums() -> None:
    """Two clients of loss 50/2 * ((a - 2)^2 + (b - 1)^2): near (2, 1), held a little to the start at (1, 1/2)."""

    def answer(round_: Round) -> dict[str, Reply]:
        out = {}
        for client, task in round_.tasks.items():
            assert isinstance(task, Stack)
            gradient = 50 * (np.array(task.weights) - [2.0, 1.0])
            out[client] = NewtonPart.of(NewtonSums(n=50, loss=0.0, gradient=gradient, hessian=50 * np.eye(2)))
        return replies(out)

    rounds, (fm, dm) = finish(fit_stack(dict.fromkeys("ab", PROMPT)), answer)

    # Minimum of 100/2 (x - best)^2 + 4/2 ((x - x0) / x0)^2: (100 best + 4/x0) / (100 + 4/x0^2).
    assert fm == pytest.approx((100 * 2 + 4) / (100 + 4))
    assert dm == pytest.approx((100 * 1 + 8) / (100 + 16))
    assert [r.name for r in rounds] == ["stack"] * 3


def test_weighing_needs_a_client() -> None:
    with pytest.raises(RunError, match="at least one"):
        finish(fit_stack({"a": PROMPT}), lambda _: replies({"a": Failed(reason="E")}))


def alone(client: str, n_rounds: int) -> Steps[str]:
    """A method that asks its one client ``n_rounds`` times for a head, and comes to the texts it was told of."""
    told = []
    for i in range(n_rounds):
        answers = yield Round(name="ask", tasks={client: Train(parameters=(float(i),))}, grants={client: i})
        (body,) = [r.body for r in answers.values()]
        assert isinstance(body, Trained)
        told.append(body.n)
    return f"{client}: {told}"


def test_methods_for_one_client_each_share_their_rounds() -> None:
    def answer(round_: Round) -> dict[str, Reply]:
        return replies({c: Trained(n=len(round_.tasks), parameters=()) for c in round_.tasks})

    rounds, done = finish(side_by_side("alone", {"a": alone("a", 3), "b": alone("b", 1), "c": alone("c", 0)}), answer)

    assert [(r.name, sorted(r.tasks), dict(r.grants)) for r in rounds] == [
        ("alone", ["a", "b"], {"a": 0, "b": 0}),
        ("alone", ["a"], {"a": 1}),
        ("alone", ["a"], {"a": 2}),
    ]
    assert done == {"a": "a: [2, 1, 1]", "b": "b: [2]", "c": "c: []"}


def test_a_client_that_missed_a_round_is_asked_again_and_one_that_is_gone_is_left_out() -> None:
    asked: list[tuple[str, float]] = []

    def answer(round_: Round) -> dict[str, Reply]:
        asked.extend((c, task.parameters[0]) for c, task in round_.tasks.items() if isinstance(task, Train))
        n = asked.count(("late", 0.0))
        here = [c for c in round_.tasks if c == "here" or (c == "late" and n >= MAX_TRIES)]
        return replies({c: Trained(n=1, parameters=()) for c in here})

    _, done = finish(side_by_side("alone", {c: alone(c, 2) for c in ("here", "late", "gone")}), answer)

    assert done == {"here": "here: [1, 1]", "late": "late: [1, 1]"}
    assert asked.count(("late", 0.0)) == asked.count(("gone", 0.0)) == MAX_TRIES
    assert asked.count(("here", 0.0)) == 1


def prompt_set(n: int) -> PromptSet:
    prompts = tuple(PromptTemplate(text=f"{i} {{text}}", words=("x", "y")) for i in range(n))
    return PromptSet(labels=("x", "y"), prompts=prompts, weights=(1.0,) * n, bias=(0.0, 0.0))


def complete(value: float) -> Evaluated:
    """Every metric, as a client gives them."""
    return Evaluated(
        n=10, values=dict.fromkeys(METRICS, value), errors=dict.fromkeys(METRICS, 0.0), calls_per_prediction=1.0
    )


def test_evaluate_grants_a_call_a_text_and_prompt_and_leaves_out_clients_without_texts() -> None:
    task = Evaluate(arm="fm", prompt=prompt_set(2))

    (sent,), got = finish(
        evaluate(dict.fromkeys("abc", task), {"a": 5, "b": 0, "c": 1}),
        lambda _: replies({"a": complete(0.5), "c": complete(1.0)}),
    )

    assert dict(sent.grants) == {"a": 10, "c": 2}
    assert set(sent.tasks) == {"a", "c"}
    assert {c: e.values["accuracy"] for c, e in got.items()} == {"a": 0.5, "c": 1.0}


def test_a_client_that_left_out_a_metric_is_left_out() -> None:
    task = Evaluate(arm="fm", prompt=prompt_set(1))

    _, got = finish(
        evaluate(dict.fromkeys("ab", task), {"a": 5, "b": 5}),
        lambda _: replies({"a": evaluated(0.5), "b": complete(1.0)}),
    )

    assert list(got) == ["b"]


def test_an_arm_without_a_prompt_makes_no_call() -> None:
    (sent,), _ = finish(evaluate({"a": Evaluate(arm="dm_local")}, {"a": 5}), lambda _: replies({"a": evaluated(0.5)}))

    assert sum(sent.grants.values()) == 0


def test_summary_by_hand() -> None:
    got = summarise({"fm": {"b": evaluated(0.5, 0.03, n=4), "a": evaluated(0.9, 0.04)}})

    entry = got["accuracy"]["fm"]
    assert entry["mean"] == 0.7
    # sqrt(0.03^2 + 0.04^2) / 2 = 0.025; 1.96 * 0.025 = 0.049
    assert entry["ci95"] == [0.651, 0.749]
    assert list(entry["by_client"]) == ["a", "b"]
    assert entry["by_client"]["b"] == {"value": 0.5, "n": 4, "ci95": [0.4412, 0.5588]}
