"""How a client predicts: each arm by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from clients.arms import ARMS, DOMAIN, RAW, Arms
from clients.client import Client
from clients.data import ClientData, Labelled
from clients.distillation import LESSON_WEIGHT
from clients.domain_models.base import smoothed
from clients.domain_models.linear import LinearHead
from clients.learning import ANSWERING
from promptfed.errors import RunError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Cascade, Evaluate, Lessons
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, fit
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FloatArray
from tests.support import LABELS, CountingFM, FailingFM, WordEncoder, client_data, parameters_of, wait_for

P = PromptTemplate(text="It seems wonderful.\nLabel: positive\n\nText: {text}\nLabel:", words=LABELS)
Q = PromptTemplate(text="It seems boring.\nLabel: negative\n\nText: {text}\nLabel:", words=LABELS)
PAIR = PromptSet(labels=LABELS, prompts=(P, Q), weights=(0.7, 0.3), bias=(0.25, -0.25))
SINGLE = PromptSet(labels=LABELS, prompts=(P,), weights=(1.0,), bias=(0.0, 0.0))
CASCADE = Cascade(single=SINGLE, thresholds=(0.9, 0.9), target=0.1)
LESSONS = Lessons(texts=("It seems superb.", "A stale plot."), shares=bytes([10, 245, 200, 55]))


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
    arms: Arms,
    fm: BaseFM,
    arm: str,
    prompt: PromptSet | None = PAIR,
    head: tuple[float, ...] = (),
    stack: tuple[float, ...] = (1.0, 0.5),
) -> FloatArray:
    return wait_for(
        arms.predict(
            Evaluate(arm=arm, prompt=prompt, parameters=head, stack=stack, lessons=LESSONS, cascade=CASCADE), fm
        )
    )[0]


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

    assert got == pytest.approx(client.domain.model.predict_proba(client.data.test.texts))
    assert fm.n_calls == 0


def test_the_averaged_head() -> None:
    arms, client, fm = scene()
    head = parameters_of(client)

    got = predict(arms, fm, "dm_fedavg", None, tuple(head))

    assert got == pytest.approx(LinearHead(2, head).predict_proba(WordEncoder().encode(client.data.test.texts)))


def test_what_all_domain_models_vote_is_learned_beside_the_own_texts() -> None:
    arms, client, fm = scene()

    got = predict(arms, fm, "dm_ensemble", None)

    texts = [*client.data.train.texts, *LESSONS.texts]
    targets = np.vstack([np.eye(2)[client.data.train.labels], LESSON_WEIGHT * np.array([[10, 245], [200, 55]]) / 255])
    by_hand = client.domain.make().fit(texts, ANSWERING * targets)
    assert got == pytest.approx(by_hand.predict_proba(client.data.test.texts))
    assert client.domain.model is client.domain.own  # nothing is kept of it


def test_where_nobody_had_parameters_to_average_a_client_has_its_own_model() -> None:
    arms, client, fm = scene()

    got = predict(arms, fm, "dm_fedavg", None, head=())

    assert got == pytest.approx(client.domain.own.predict_proba(client.data.test.texts))


def test_fm_and_domain_model_are_weighed_together() -> None:
    arms, client, fm = scene()
    test = np.stack([np.asarray(fm.score_labels(p, client.data.test.texts)) for p in PAIR.prompts], axis=1)
    domain = smoothed(client.domain.model.predict_proba(client.data.test.texts))
    # The FM's calibration knows the label proportions, 16/22 and 6/22; the domain model's share of them is taken off.
    half = 0.5 * np.log(16 / 6)
    own = client.domain.calibration.logits(domain[:, None]) - np.array([-half, half])

    got = predict(arms, fm, "fm_dm", stack=(1.5, 0.25))

    both = 1.5 * arms.calibrate(PAIR).logits(test) + 0.25 * own
    assert got == pytest.approx(softmax(both, axis=1))
    assert predict(arms, fm, "fm_dm", stack=(1.0, 0.0)) == pytest.approx(predict(arms, fm, "fm"))


def test_a_client_s_part_in_weighing_is_the_slope_of_its_loss() -> None:
    arms, _, _ = scene()

    at = arms.stack_sums(PAIR, (1.0, 0.5))

    step = 1e-5
    slopes = [
        (arms.stack_sums(PAIR, up).loss - arms.stack_sums(PAIR, down).loss) / (2 * step)
        for up, down in (((1 + step, 0.5), (1 - step, 0.5)), ((1.0, 0.5 + step), (1.0, 0.5 - step)))
    ]
    assert at.n == 16
    assert at.gradient == pytest.approx(slopes, abs=1e-6)
    assert (np.linalg.eigvalsh(at.hessian) >= 0).all()
    assert arms.stack_sums(PAIR, (0.0, 0.0)).loss == pytest.approx(16 * np.log(2))


def test_the_domain_model_in_the_weighing_has_not_seen_the_text() -> None:
    """One text with a label that no other text like it has: out of fold, the domain model can't know it."""
    _, client, _ = scene()

    held_out, fitted = client.domain.held_out, np.log(client.domain.model.predict_proba(client.data.train.texts))

    labels = client.data.train.labels
    rows = np.arange(len(labels))
    assert held_out.shape == fitted.shape == (20, 2)
    assert held_out[rows, labels].mean() < fitted[rows, labels].mean()


def test_weighing_without_weights_is_an_error() -> None:
    arms, _, fm = scene()

    with pytest.raises(RunError, match="weights of FM and domain model"):
        predict(arms, fm, "fm_dm", stack=())


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
    head = parameters_of(client)

    got = predict(arms, fm, arm, PAIR, tuple(head))

    assert got.shape == (12, 2)
    assert np.isfinite(got).all()
    assert got.sum(axis=1) == pytest.approx(np.ones(12))


def test_an_arm_by_a_wrong_name() -> None:
    arms, _, fm = scene()

    with pytest.raises(UnknownNameError, match="did you mean 'fm_pooled'"):
        predict(arms, fm, "fm_poled")


@pytest.mark.parametrize("arm", sorted(set(ARMS) - DOMAIN))
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
