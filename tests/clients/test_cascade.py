"""Which stage answers, what that costs, and what a client says of its risk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clients.cascade import passed_through
from clients.client import Client
from clients.data import ClientData
from clients.learning import Learning
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import (
    Ask,
    Cascade,
    Distil,
    Evaluate,
    Evaluated,
    Lessons,
    Risk,
    RiskCounts,
    Task,
    TaskBody,
    Unlearn,
    Unlearned,
    decode_reply,
    encode,
)
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FloatArray
from tests.support import LABELS, CountingFM, WordEncoder, client_data, sentences, wait_for

P = PromptTemplate(text="It seems wonderful.\nLabel: positive\n\nText: {text}\nLabel:", words=LABELS)
Q = PromptTemplate(text="It seems boring.\nLabel: negative\n\nText: {text}\nLabel:", words=LABELS)
PAIR = PromptSet(labels=LABELS, prompts=(P, Q), weights=(0.7, 0.3), bias=(0.0, 0.0))
SINGLE = PromptSet(labels=LABELS, prompts=(P,), weights=(1.0,), bias=(0.0, 0.0))


def sure(*p: float) -> FloatArray:
    return np.array([[1 - x, x] for x in p])


def test_a_stage_answers_what_it_is_sure_of_and_passes_on_the_rest() -> None:
    stages = (lambda: sure(0.95, 0.2, 0.6, 0.5), lambda: sure(0.1, 0.1, 0.9, 0.6), lambda: sure(0.3, 0.3, 0.3, 0.7))

    passed = passed_through(stages, (0.9, 0.8))

    assert passed.stage.tolist() == [0, 1, 1, 2]
    assert passed.proba[:, 1].tolist() == [0.95, 0.1, 0.9, 0.7]
    # The pair asks P, which the single prompt has asked already, and Q.
    assert passed.calls(Cascade(single=SINGLE, thresholds=(0.9, 0.8), target=0.1), PAIR) == (0 + 1 + 1 + 2) / 4


def test_nothing_is_computed_that_nobody_needs() -> None:
    def never() -> FloatArray:
        raise AssertionError("asked")

    assert passed_through((lambda: sure(0.99), never, never), (0.9, 0.9)).stage.tolist() == [0]


def a_client() -> Client:
    data = client_data("north", 40, 30, n_words=2)
    return Client(data, LABELS, CountingFM(ScriptedFM()), WordEncoder(), seed=1)


def ask(client: Client, body: TaskBody, grant: int = 1000) -> object:
    task = Task(round=1, client_id="north", run="run", fleet="tuning", grant=grant, limit=10_000, body=body)
    return decode_reply(wait_for(client.handle(encode(task)))).body


def risk(*thresholds: float, tried: tuple[float, ...] = (0.5, 0.7, 0.999)) -> Risk:
    return Risk(single=SINGLE, stack=(1.0, 0.5), thresholds=thresholds, tried=tried)


def test_the_first_stage_is_judged_by_all_labelled_texts_and_without_an_fm_call() -> None:
    client = a_client()

    counts = ask(client, risk(), grant=0)

    proba = np.exp(client.domain.judged)
    wrong = proba.argmax(axis=1) != client.data.train.labels
    assert counts == RiskCounts(
        n=40,
        answered=tuple(int((proba.max(axis=1) >= np.float32(t)).sum()) for t in (0.5, 0.7, 0.999)),
        wrong=tuple(int((wrong & (proba.max(axis=1) >= np.float32(t))).sum()) for t in (0.5, 0.7, 0.999)),
    )


def test_the_second_stage_is_judged_by_the_texts_that_reach_it_and_were_scored() -> None:
    client = a_client()
    ask(client, Ask(prompts=(P,), stop=25))

    everything, nothing, some = (ask(client, risk(t), grant=0) for t in (2.0, 0.5, 0.7))

    assert isinstance(everything, RiskCounts)
    assert isinstance(nothing, RiskCounts)
    assert isinstance(some, RiskCounts)
    assert (everything.n, nothing.n) == (25, 0)
    assert 0 < some.n < 25
    assert everything.answered[0] == 25


@pytest.mark.parametrize("thresholds", [(2.0, 2.0), (0.5, 0.5), (2.0, 0.5)])
def test_the_arm_is_the_stage_that_answers(thresholds: tuple[float, float]) -> None:
    client = a_client()
    ask(client, Ask(prompts=(P, Q), stop=40))
    cascade = Cascade(single=SINGLE, thresholds=thresholds, target=0.1)
    last = {(2.0, 2.0): 2, (0.5, 0.5): 0, (2.0, 0.5): 1}[thresholds]

    got = ask(client, Evaluate(arm="cascade", prompt=PAIR, stack=(1.0, 0.5), cascade=cascade))
    alike = ask(client, Evaluate(arm="fm_dm", prompt=SINGLE if last == 1 else PAIR, stack=(1.0, 0.5)))

    assert isinstance(got, Evaluated)
    assert isinstance(alike, Evaluated)
    assert got.calls_per_prediction == last
    assert got.answered == tuple(30 if i == last else 0 for i in range(3))
    assert got.wrong[last] == pytest.approx(30 * (1 - got.values["accuracy"]), abs=1e-3)
    if last:
        assert got.values == alike.values


def test_a_model_of_labels_that_mean_nothing_is_not_judged_to_be_better_than_chance() -> None:
    """Six labels dealt out at random to 24 texts."""
    right, as_if_new = [], []
    for seed in range(12):
        data = sentences(24, seed)
        labels = np.random.default_rng(seed).integers(6, size=24)
        shuffled = ClientData(client_id="c", train=replace(data, labels=labels), test=data)
        domain = Learning("linear", WordEncoder(), shuffled, 6, seed)
        right.append((domain.judged.argmax(axis=1) == labels).mean())
        as_if_new.append((domain.calibration.logits(domain.held_out[:, None]).argmax(axis=1) == labels).mean())

    assert np.mean(right) < 1 / 6 < np.mean(as_if_new) - 0.03  # a calibration that has seen the labels finds a pattern


def test_lessons_are_learned_and_taken_back() -> None:
    client = a_client()
    before = client.domain.model.predict_proba(client.data.test.texts)
    judged = client.domain.judged
    lessons = Lessons(texts=("It seems superb.", "A stale plot."), shares=bytes([255, 0, 0, 255]))  # the wrong way

    ask(client, Distil(prompt=None, stop=0, lessons=lessons, temperature=1.0, min_confidence=0.0))
    after = client.domain.model.predict_proba(client.data.test.texts)
    done = ask(client, Unlearn())

    assert done == Unlearned()
    assert not np.allclose(after, before)
    assert np.array_equal(client.domain.model.predict_proba(client.data.test.texts), before)
    assert np.array_equal(client.domain.judged, judged)
