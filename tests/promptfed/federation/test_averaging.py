"""What domain models learn from one another, with numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from promptfed.errors import ConfigError, RunError
from promptfed.federation.averaging import (
    ADAPTIVITY,
    BETA1,
    BETA2,
    N_ROUNDS,
    PROXIMAL,
    STEP,
    averaged,
    ensemble,
)
from promptfed.messages import Failed, Reply, ReplyBody, Train, Trained, Votes
from promptfed.strategies.base import Round
from tests.support import finish, replies


def one_step_up(round_: Round) -> Mapping[str, Reply]:
    """``a`` (one text) adds 4 to the first parameter; ``b`` (three texts) sets the second to 8."""
    body = round_.tasks["a"]
    assert isinstance(body, Train)
    start = body.parameters or (0.0, 0.0)
    bodies: dict[str, ReplyBody] = {
        "a": Trained(n=1, parameters=(start[0] + 4.0, 0.0)),
        "b": Trained(n=3, parameters=(start[0], 8.0)),
    }
    return replies(bodies)


def test_fedavg_weighs_by_texts_and_sends_the_mean_on() -> None:
    rounds, parameters = finish(averaged({"a": "linear", "b": "linear"}, "fedavg"), one_step_up)

    assert len(rounds) == N_ROUNDS
    sent = [task for r in rounds if isinstance(task := r.tasks["b"], Train)]
    assert sent[0] == Train(parameters=(), proximal=0.0)
    assert sent[1].parameters == (1.0, 6.0)  # (1*4 + 3*0)/4 and (1*0 + 3*8)/4
    assert parameters == {"a": (float(N_ROUNDS), 6.0), "b": (float(N_ROUNDS), 6.0)}


def test_fedprox_is_fedavg_with_clients_held_to_the_average() -> None:
    rounds, parameters = finish(averaged({"a": "linear", "b": "linear"}, "fedprox"), one_step_up)

    assert all(isinstance(t, Train) and t.proximal == PROXIMAL for r in rounds for t in r.tasks.values())
    assert parameters["a"] == (float(N_ROUNDS), 6.0)


def test_fedadam_steps_along_the_mean_change() -> None:
    """The first round gives the start, (1, 6); in the second the mean is (2, 6): a change of (1, 0)."""
    rounds, _ = finish(averaged({"a": "linear", "b": "linear"}, "fedadam"), one_step_up)

    sent = [task for r in rounds if isinstance(task := r.tasks["a"], Train)]
    m, v = (1 - BETA1) * 1.0, BETA2 * ADAPTIVITY**2 + (1 - BETA2) * 1.0
    assert sent[1].parameters == (1.0, 6.0)
    assert sent[2].parameters == pytest.approx((1.0 + STEP * m / (np.sqrt(v) + ADAPTIVITY), 6.0))


def test_kinds_are_averaged_apart_and_those_without_parameters_not_at_all() -> None:
    kinds = {"a": "linear", "b": "mlp", "c": "mlp", "d": "tfidf_bayes"}
    bodies: dict[str, ReplyBody] = {
        "a": Trained(n=2, parameters=(1.0, 2.0)),
        "b": Trained(n=1, parameters=(3.0,)),
        "c": Trained(n=1, parameters=(5.0,)),
        "d": Trained(n=9, parameters=()),
    }

    rounds, parameters = finish(averaged(kinds, "fedavg"), lambda _: replies(bodies))

    assert parameters == {"a": (1.0, 2.0), "b": (4.0,), "c": (4.0,), "d": ()}
    assert [t.parameters for t in rounds[1].tasks.values() if isinstance(t, Train)] == [(1.0, 2.0), (4.0,), (4.0,), ()]


def test_parameters_of_another_size_are_left_out() -> None:
    """A client with another encoder than the rest must not end the run."""
    bodies: dict[str, ReplyBody] = {
        "a": Trained(n=2, parameters=(1.0, 2.0)),
        "b": Trained(n=2, parameters=(3.0, 4.0)),
        "c": Trained(n=3, parameters=(9.0,)),
        "d": Trained(n=0, parameters=(9.0,)),
    }

    _, parameters = finish(averaged(dict.fromkeys("abcd", "linear"), "fedavg"), lambda _: replies(bodies))

    assert parameters["a"] == (2.0, 3.0)


def test_nothing_to_average_is_told_with_the_kinds() -> None:
    with pytest.raises(RunError, match="tfidf_bayes"):
        finish(averaged({"a": "tfidf_bayes"}, "fedavg"), lambda _: replies({"a": Failed(reason="E")}))


def test_the_ensemble_is_the_mean_vote_on_public_texts() -> None:
    votes: dict[str, ReplyBody] = {
        "a": Votes(n_labels=2, shares=bytes([255, 0, 100, 155])),
        "b": Votes(n_labels=2, shares=bytes([55, 200, 200, 55])),
        "other labels": Votes(n_labels=3, shares=bytes(6)),
        "half": Votes(n_labels=2, shares=bytes(2)),
    }

    _, lessons = finish(ensemble([*votes], 2, ["one", "two"]), lambda _: replies(votes))

    assert lessons.texts == ("one", "two")
    assert [*lessons.shares] == [155, 100, 150, 105]


def test_the_ensemble_needs_public_texts_and_a_vote() -> None:
    with pytest.raises(ConfigError, match=r"data\.public"):
        finish(ensemble(["a"], 2, []), lambda _: {})
    with pytest.raises(RunError, match="no client voted"):
        finish(ensemble(["a"], 2, ["one"]), lambda _: replies({"a": Failed(reason="E")}))
