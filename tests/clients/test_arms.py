"""How a client predicts: each arm by its definition."""

from __future__ import annotations

import numpy as np
import pytest

from clients.arms import ARMS, RAW, Arms, with_source
from clients.client import Client
from clients.data import ClientData, Labelled
from clients.domain import LinearHead, smoothed
from promptfed.errors import RunError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Evaluate
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, fit
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FloatArray
from tests.support import LABELS, CountingFM, FailingFM, WordEncoder, client_data, wait_for

P = PromptTemplate(text="It seems wonderful.\nLabel: positive\n\nText: {text}\nLabel:", words=LABELS)
Q = PromptTemplate(text="It seems boring.\nLabel: negative\n\nText: {text}\nLabel:", words=LABELS)
PAIR = PromptSet(labels=LABELS, prompts=(P, Q), weights=(0.7, 0.3), bias=(0.25, -0.25))


def mostly_cheerful() -> ClientData:
    """Held-out texts of both labels alike; 15 cheerful and 5 gloomy ones to train on."""
    data = client_data("north", 30, 12)
    kept = np.concatenate([np.flatnonzero(data.train.labels == 1), np.flatnonzero(data.train.labels == 0)[:5]])
    order = np.random.default_rng(0).permutation(kept)
    train = Labelled(texts=tuple(data.train.texts[i] for i in order), labels=data.train.labels[order])
    return ClientData(client_id="north", train=train, test=data.test)


def scene(fm: BaseFM | None = None) -> tuple[Arms, Client, CountingFM]:
    counting = CountingFM(fm or ScriptedFM())
    client = Client(mostly_cheerful(), LABELS, counting, WordEncoder(), seed=1)
    wait_for(client.scores.ask(counting, PAIR.prompts, 16))
    counting.requests.clear()
    return client.arms, client, counting


def predict(
    arms: Arms, fm: BaseFM, arm: str, prompt: PromptSet | None = PAIR, head: tuple[float, ...] = ()
) -> FloatArray:
    return wait_for(arms.predict(Evaluate(arm=arm, prompt=prompt, head=head), fm))[0]


def test_the_pooled_arm_uses_the_calibration_of_the_prompt_set() -> None:
    arms, client, fm = scene()
    scores = np.stack([np.asarray(fm.score_labels(p, client.data.test.texts)) for p in PAIR.prompts], axis=1)

    pooled = predict(arms, fm, "fm_pooled")

    assert pooled == pytest.approx(Calibration(weights=(0.7, 0.3), bias=(0.25, -0.25)).predict_proba(scores))


def test_the_calibrated_arm_is_fitted_on_training_scores_alone() -> None:
    arms, client, fm = scene()
    train, labels, _ = client.scores.get(PAIR.prompts)
    # Label proportions 16/22 and 6/22 (each counted once more) move the pooled bias of (1/4, -1/4).
    half = 0.5 * np.log(16 / 6)
    start = Calibration(weights=(0.7, 0.3), bias=(0.25 - half, -0.25 + half))
    own = fit(train, labels, towards=start)
    test = np.stack([np.asarray(fm.score_labels(p, client.data.test.texts)) for p in PAIR.prompts], axis=1)

    assert len(train) == 16
    assert predict(arms, fm, "fm") == pytest.approx(own.predict_proba(test))


@pytest.mark.parametrize("arm", sorted(RAW))
def test_a_raw_arm_is_the_answer_of_the_model_as_it_is(arm: str) -> None:
    arms, client, fm = scene()
    single = PromptSet(labels=LABELS, prompts=(P,), weights=(9.0,), bias=(5.0, -5.0))  # not to be used

    got = predict(arms, fm, arm, single)

    assert got == pytest.approx(np.exp(np.asarray(fm.score_labels(P, client.data.test.texts))))


def test_the_domain_model_alone() -> None:
    arms, client, fm = scene()

    got = predict(arms, fm, "dm_local", None)

    assert got == pytest.approx(client.domain_model().predict_proba(client.data.test.texts))
    assert fm.n_calls == 0


def test_the_averaged_head() -> None:
    arms, client, fm = scene()
    head = client.domain_model().head.flat
    assert head is not None

    got = predict(arms, fm, "dm_fedavg", None, tuple(head))

    assert got == pytest.approx(LinearHead(2, head).predict_proba(WordEncoder().encode(client.data.test.texts)))


def test_stacking_adds_the_domain_model_as_a_source() -> None:
    arms, client, fm = scene()

    got = predict(arms, fm, "fm_dm")

    stacker = arms.stack(PAIR)
    assert len(stacker.weights) == 3
    assert stacker.weights[2] > 0.1  # it knows words that the prompts do not
    test = np.stack([np.asarray(fm.score_labels(p, client.data.test.texts)) for p in PAIR.prompts], axis=1)
    domain = smoothed(client.domain_model().predict_proba(client.data.test.texts))
    assert got == pytest.approx(stacker.predict_proba(with_source(test, domain)))
    labels = client.data.test.labels
    assert (got.argmax(axis=1) == labels).mean() >= (predict(arms, fm, "fm").argmax(axis=1) == labels).mean()


def test_calls_are_one_a_text_and_prompt_and_are_made_once() -> None:
    arms, _, fm = scene()

    _, calls = wait_for(arms.predict(Evaluate(arm="fm", prompt=PAIR), fm))
    assert (calls, fm.n_calls) == (2.0, 24)
    for arm in ("fm_pooled", "fm_dm", "centralised"):
        predict(arms, fm, arm)
    assert fm.n_calls == 24


@pytest.mark.parametrize("arm", sorted(ARMS))
def test_every_arm_gives_probabilities_even_where_the_model_refuses(arm: str) -> None:
    arms, client, fm = scene(FailingFM())
    head = client.domain_model().head.flat
    assert head is not None

    got = predict(arms, fm, arm, PAIR, tuple(head))

    assert got.shape == (12, 2)
    assert np.isfinite(got).all()
    assert got.sum(axis=1) == pytest.approx(np.ones(12))


def test_an_arm_by_a_wrong_name() -> None:
    arms, _, fm = scene()

    with pytest.raises(UnknownNameError, match="did you mean 'fm_pooled'"):
        predict(arms, fm, "fm_poled")


@pytest.mark.parametrize("arm", sorted(set(ARMS) - {"dm_local", "dm_fedavg"}))
def test_an_arm_without_the_prompt_that_it_needs(arm: str) -> None:
    arms, _, fm = scene()

    with pytest.raises(RunError, match=f"{arm!r} needs a prompt"):
        predict(arms, fm, arm, None)


def test_a_client_that_scored_nothing_has_the_pooled_calibration_shifted_to_its_labels() -> None:
    client = Client(mostly_cheerful(), LABELS, ScriptedFM(), WordEncoder(), seed=1)

    got = client.arms.calibrate(PAIR)

    half = 0.5 * np.log(16 / 6)
    assert got.weights == PAIR.weights
    assert got.bias == pytest.approx((0.25 - half, -0.25 + half))


def test_with_source_appends_a_source() -> None:
    scores, source = np.zeros((2, 1, 3)), np.arange(6.0).reshape(2, 3)

    both = with_source(scores, source)

    assert both.shape == (2, 2, 3)
    assert both[1, 1].tolist() == [3.0, 4.0, 5.0]
