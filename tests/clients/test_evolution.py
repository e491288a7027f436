"""The client's part of soft-prompt search: what it asks, what it hides, and what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clients.client import Client
from clients.evolution import HIDDEN, hide_words, loss
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Failed, Reply, Task, decode_reply, encode
from promptfed.messages.methods import Evolve, Evolved, packed, unpacked
from promptfed.prompts.soft import Projection
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.evolution import pack
from promptfed.types import LabelRequest
from tests.planted import SPACE, Planted
from tests.support import LABELS, CountingFM, WordEncoder, client_data, wait_for

D = 4
PROJECTION = Projection.into(SPACE, seed=1, dimension=D, n_vectors=1, scale=1.0, sigma=1.0)


def task(**changes: Any) -> Evolve:
    values: dict[str, Any] = {
        "template": PromptTemplate(text="Review: {text}\nLabel:", words=LABELS),
        "projection": PROJECTION,
        "mean": packed(np.zeros(D)),
        "sigma": 1.0,
        "form": "separable",
        "covariance": pack(np.ones(D), "separable", 0),
        "population": 6,
        "n_iterations": 2,
        "n_texts": 5,
        "mask_rate": 0.0,
        "calibrated": True,
        "seed": 3,
        **changes,
    }
    return Evolve(**values)


def a_client(client_id: str = "a", n_train: int = 40, fm: ScriptedFM | None = None) -> tuple[Client, CountingFM]:
    counting = CountingFM(fm or Planted(PROJECTION).fm())
    data = replace(client_data("same", n_train=n_train), client_id=client_id)
    return Client(data, LABELS, counting, WordEncoder(), seed=1), counting


def answer(client: Client, body: Evolve, grant: int = 10_000) -> Reply:
    sent = Task(round=1, client_id=client.client_id, run="r", fleet="tuning", grant=grant, limit=grant, body=body)
    return decode_reply(wait_for(client.handle(encode(sent))))


def evolved(body: Evolve, client_id: str = "a", **about: Any) -> Evolved:
    client, _ = a_client(client_id, **about)
    got = answer(client, body).body
    assert isinstance(got, Evolved)
    return got


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, (2 * 6 + 1) * 5),
        ({"n_iterations": 3, "population": 4, "n_texts": 2}, (3 * 4 + 1) * 2),
        ({"mask_rate": 0.5}, (2 * 6 + 1) * 5 * 2),
        ({"n_texts": 999}, (2 * 6 + 1) * 40),  # all that it has
    ],
)
def test_every_prompt_costs_its_texts_twice_with_hidden_words(changes: dict[str, Any], calls: int) -> None:
    client, fm = a_client()

    reply = answer(client, task(**changes), grant=calls)

    assert isinstance(reply.body, Evolved)
    assert reply.usage.fm_calls == fm.n_calls == calls
    assert len(fm.batches) == changes.get("n_iterations", 2) + 1  # one a generation, and the mean


def test_a_grant_that_is_too_small_is_not_passed() -> None:
    client, fm = a_client()

    reply = answer(client, task(), grant=64)

    assert isinstance(reply.body, Failed)
    assert reply.body.reason == "BudgetError"
    assert fm.n_calls <= 64


# ---------------------------------------------------------------- what it finds


def test_it_moves_towards_the_planted_optimum() -> None:
    planted = Planted(PROJECTION)

    got = evolved(task(n_iterations=30, n_texts=10))

    start, end = (planted.distance(PROJECTION.soft(z)) for z in (np.zeros(D), unpacked(got.mean, D)))
    assert start == pytest.approx(2.0, rel=0.5)
    assert end < 0.5 * start
    assert got.fitness < 0.3
    assert len(got.sigmas) == 30
    assert got.sigmas[0] == 1.0


def test_it_starts_where_the_server_is_and_looks_where_that_looks() -> None:
    still = pack(np.array([1.0, 1e-10, 1e-10, 1e-10]), "separable", 0)

    got = evolved(task(mean=packed(np.array([5.0, 6.0, 7.0, 8.0])), covariance=still))

    mean = unpacked(got.mean, D)
    assert mean[1:] == pytest.approx([6.0, 7.0, 8.0], abs=1e-3)
    assert 0.01 < abs(mean[0] - 5.0) < 5.0


def test_the_same_task_has_the_same_answer_and_no_two_clients_draw_alike() -> None:
    first = evolved(task())

    assert evolved(task()) == first
    assert evolved(task(seed=4)).mean != first.mean
    assert evolved(task(), client_id="b").mean != first.mean  # though it holds the same texts


def test_each_generation_is_judged_on_texts_of_its_own() -> None:
    client, fm = a_client(n_train=40)

    answer(client, task())

    texts = [r.text for r in fm.requests if isinstance(r, LabelRequest)]
    generations = [set(texts[:30]), set(texts[30:60]), set(texts[60:])]
    of_client = {" " + t: i for i, t in enumerate(client.data.train.texts)}
    assert all(text in of_client for text in texts)
    assert [len(texts[at : at + 5]) for at in range(0, 60, 5)] == [5] * 12
    assert len(set().union(*generations)) > 5


def test_a_covariance_of_another_size_is_a_failed_task() -> None:
    client, fm = a_client()

    reply = answer(client, task(covariance=packed(np.ones(D + 1))))

    assert isinstance(reply.body, Failed)
    assert fm.n_calls == 0


# ---------------------------------------------------------------- fitness


def test_plain_loss_by_hand() -> None:
    scores = np.log(np.array([[0.5, 0.5], [0.25, 0.75]]))

    assert loss(scores, np.array([0, 0]), None) == pytest.approx((np.log(2) + np.log(4)) / 2)


def test_under_calibration_a_leaning_prompt_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(8) % 2
    good = np.where(labels[:, None] == np.arange(2), 1.0, -1.0) + 0.5 * rng.standard_normal((8, 2))
    lean = good + np.array([3.0, 0.0])
    even = np.zeros(2)

    def normalised(logits: Any) -> Any:
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    plain = [loss(normalised(s), labels, None) for s in (good, lean)]
    calibrated = [loss(normalised(s), labels, even) for s in (good, lean)]
    assert plain[1] > plain[0] + 0.4
    assert calibrated[1] == pytest.approx(calibrated[0])
    assert calibrated[0] < np.log(2)


def test_the_share_of_hidden_words_by_hand() -> None:
    text = "one two\tthree  four five six seven eight nine ten"

    for rate, n in ((0.0, 0), (0.4, 4), (0.55, 6), (1.0, 10)):
        hidden = hide_words(text, rate, np.random.default_rng(0))
        assert hidden.split().count(HIDDEN) == n
        assert len(hidden.split()) == 10
    assert "\t" in hidden
    assert "  " in hidden


def test_hidden_words_are_in_random_places() -> None:
    counts = np.zeros(4)
    for seed in range(400):
        counts += [word == HIDDEN for word in hide_words("a b c d", 0.5, np.random.default_rng(seed)).split()]

    assert counts / 400 == pytest.approx([0.5] * 4, abs=0.1)


def test_with_hidden_words_fitness_is_a_ratio_of_losses() -> None:
    """A model that reads nothing loses the same on both: the ratio is 1."""
    deaf = ScriptedFM("deaf", rule=lambda _: [0.0, 0.0], soft_space=SPACE)

    assert evolved(task(mask_rate=0.5, calibrated=False), fm=deaf).fitness == pytest.approx(1.0)
    assert evolved(task(calibrated=False), fm=deaf).fitness == pytest.approx(np.log(2), rel=1e-5)


def test_hidden_words_are_what_the_model_reads() -> None:
    client, fm = a_client()

    answer(client, task(mask_rate=0.5, n_iterations=1))

    read = [r.text for r in fm.requests if isinstance(r, LabelRequest)]
    hidden = [text.split().count(HIDDEN) for text in read]
    assert [len(text.split()) for text in read] == [7] * len(read)
    assert hidden.count(4) == hidden.count(0) == len(read) // 2  # half of seven, rounded
