"""The store of label scores: paid for once, bounded, and a refused item keeps its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.data import Labelled
from clients.scores import ScoreStore, brier_score
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.prompts.calibration import Calibration, cross_fitted_proba
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FMResponse
from tests.support import LABELS, CountingFM, FailingFM, sentences, wait_for

P = PromptTemplate(text="A: {text}", words=LABELS)
Q = PromptTemplate(text="B: {text}", words=LABELS)
NEUTRAL = Calibration(weights=(1.0,), bias=(0.0, 0.0))


class SomeFail(ScriptedFM):
    """Refuses texts that hold a marked word."""

    async def complete(self, requests: Any) -> list[FMResponse]:
        answers = await super().complete(requests)
        return [
            FMResponse(error="refused") if "refuse" in r.text else a for r, a in zip(requests, answers, strict=True)
        ]


def store_of(*texts: str) -> ScoreStore:
    return ScoreStore(Labelled(texts=texts, labels=np.arange(len(texts)) % 2), 2)


def test_nothing_is_asked_twice() -> None:
    store, fm = ScoreStore(sentences(10), 2), CountingFM(ScriptedFM())

    calls = [
        wait_for(store.ask(fm, prompts, stop))
        for prompts, stop in [((P,), 4), ((P,), 4), ((P, P, Q), 6), ((Q,), 6), ((P,), 99), ((P,), 0)]
    ]

    assert calls == [4, 0, 2 + 6, 0, 4, 0]
    assert fm.n_calls == 16
    assert fm.batches == [4, 8, 4]  # one batch a request of the server, and none for nothing


def test_another_readout_is_another_view_of_the_same_answers() -> None:
    store, fm = ScoreStore(sentences(6), 2), CountingFM(ScriptedFM())
    tilted = PromptTemplate(text=P.text, words=LABELS, readout=(0.5, 2.0))
    wait_for(store.ask(fm, (P,), 4))
    before = store.get((P, tilted))[0]

    calls = wait_for(store.ask(fm, (tilted,), 6))
    after = store.get((P, tilted))[0]

    assert (calls, fm.n_calls) == (2, 6)
    assert after.shape == (6, 2, 2)
    assert after[:4] == pytest.approx(before)
    words, _ = store.words(P)
    assert words.shape == (6, 2, 2)
    log_p = after[:, 0]  # plain scores are the words' own log-probabilities, normalised
    want = 2.0 * log_p[:, 1] - 0.5 * log_p[:, 0]
    assert after[:, 1, 1] - after[:, 1, 0] == pytest.approx(want)


def test_scores_stand_where_their_text_stands() -> None:
    data = sentences(6)
    store, fm = ScoreStore(data, 2), ScriptedFM()
    wait_for(store.ask(fm, (P,), 3))
    wait_for(store.ask(fm, (P, Q), 6))

    scores, labels, rows = store.get((P, Q))

    assert scores.shape == (6, 2, 2)
    assert scores[:, 0] == pytest.approx(np.asarray(fm.score_labels(P, data.texts)))
    assert scores[:, 1] == pytest.approx(np.asarray(fm.score_labels(Q, data.texts)))
    assert labels.tolist() == data.labels.tolist()
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]


def test_get_gives_the_texts_that_all_prompts_share() -> None:
    store, fm = ScoreStore(sentences(10), 2), ScriptedFM()
    wait_for(store.ask(fm, (P,), 7))
    wait_for(store.ask(fm, (Q,), 4))

    assert len(store.get((P,))[0]) == 7
    assert len(store.get((P, Q))[0]) == 4
    assert len(store.get((P, Q), 2)[0]) == 2
    assert len(store.get((PromptTemplate(text="new {text}", words=LABELS),))[0]) == 0


def test_a_refused_item_is_uniform_scores_zero_and_is_not_asked_again() -> None:
    store, fm = store_of("one", "refuse this", "three", "four"), CountingFM(SomeFail())
    wait_for(store.ask(fm, (P,), 4))

    scores, _, rows = store.get((P,))
    values = store.proper_scores((P,), 4, NEUTRAL)

    assert rows.tolist() == [0, 1, 2, 3]
    assert np.exp(scores[1, 0]) == pytest.approx([0.5, 0.5])
    assert values[1] == 0.0
    assert (values[[0, 2, 3]] > 0).all()
    assert wait_for(store.ask(fm, (P,), 4)) == 0


def test_a_set_fails_where_any_of_its_prompts_failed() -> None:
    store = store_of("one", "refuse this", "three")
    wait_for(store.ask(SomeFail(), (P,), 3))
    wait_for(store.ask(ScriptedFM(), (Q,), 3))

    assert store.proper_scores((Q,), 3, NEUTRAL)[1] > 0.0
    pair = Calibration(weights=(0.5, 0.5), bias=(0.0, 0.0))
    assert store.proper_scores((P, Q), 3, pair)[1] == 0.0


def test_a_model_that_raised_left_nothing_behind() -> None:
    store = ScoreStore(sentences(4), 2)
    with pytest.raises(RuntimeError):
        wait_for(store.ask(FailingFM(RuntimeError("down")), (P,), 4))

    assert len(store.get((P,))[0]) == 0
    assert wait_for(store.ask(ScriptedFM(), (P,), 4)) == 4


def test_proper_scores_are_brier_scores_under_the_pooled_calibration_shifted_and_cross_fitted() -> None:
    plain = sentences(12)
    # 6 cheerful texts and 2 gloomy ones: with one more each, 7/10 and 3/10.
    kept = [i for i in range(12) if plain.labels[i]] + np.flatnonzero(plain.labels == 0)[:2].tolist()
    store = ScoreStore(Labelled(texts=tuple(plain.texts[i] for i in kept), labels=plain.labels[kept]), 2)
    wait_for(store.ask(ScriptedFM(), (P,), 8))

    got = store.proper_scores((P,), 8, Calibration(weights=(0.8,), bias=(0.3, -0.3)))

    scores, labels, _ = store.get((P,))
    half = 0.5 * np.log(7 / 3)
    start = Calibration(weights=(0.8,), bias=(0.3 - half, -0.3 + half))
    assert store.log_prior == pytest.approx([-half, half])
    assert got == pytest.approx(brier_score(cross_fitted_proba(scores, labels, towards=start), labels))


def test_a_prompt_that_was_never_asked_about_has_no_scores() -> None:
    """A client that missed the asking still answers: over no text."""
    assert len(ScoreStore(sentences(4), 2).proper_scores((P,), 4, NEUTRAL)) == 0


def test_adopt_takes_over_the_same_texts() -> None:
    pooled = store_of("one", "refuse this", "three", "four")
    wait_for(pooled.ask(SomeFail(), (P,), 4))
    mine = store_of("four", "refuse this")

    mine.adopt(pooled, np.array([3, 1]))

    assert mine.get((P,))[0] == pytest.approx(pooled.get((P,))[0][[3, 1]])
    assert mine.proper_scores((P,), 2, NEUTRAL)[1] == 0.0
    assert wait_for(mine.ask(ScriptedFM(), (P,), 2)) == 0


def test_brier_score_by_hand() -> None:
    proba = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.8, 0.2]])

    # right, wrong, even: 1 - (1/4 + 1/4)/2 = 3/4; 1 - (0.04 + 0.04)/2 = 0.96
    assert brier_score(proba, np.array([0, 1, 0, 0])).tolist() == pytest.approx([1.0, 0.0, 0.75, 0.96])


@given(n=st.integers(0, 12), stop=st.integers(0, 15), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_proper_scores_lie_between_zero_and_one(n: int, stop: int, seed: int) -> None:
    store, fm = ScoreStore(sentences(n, seed), 2), ScriptedFM()

    asked = wait_for(store.ask(fm, (P, Q), stop))
    got = store.proper_scores((P, Q), stop, Calibration(weights=(1.0, 1.0), bias=(0.0, 0.0)))

    assert asked == 2 * min(n, stop)
    assert got.shape == (min(n, stop),)
    assert ((got >= 0.0) & (got <= 1.0)).all()


def test_the_store_takes_any_model() -> None:
    fm: BaseFM = FailingFM()

    assert wait_for(store_of("one").ask(fm, (P,), 1)) == 1
