"""How sure is sure enough: bounds by hand, and that they hold where they should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import RunError
from promptfed.federation.cascade import NEVER, TRIED, fit_cascade, threshold_for, upper_bound
from promptfed.messages import Ask, Failed, Reply, Risk, RiskCounts
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Federation, Reading, Round
from tests.support import LABELS, finish, replies

N = len(TRIED)


def prompt_set(text: str) -> PromptSet:
    prompt = PromptTemplate(text=f"{text} {{text}}", words=LABELS)
    return PromptSet(labels=LABELS, prompts=(prompt,), weights=(1.0,), bias=(0.0, 0.0))


SINGLE = prompt_set("one")


def test_the_bound_of_no_error_at_all_is_known_in_closed_form() -> None:
    """(1 - p)^n = level."""
    assert upper_bound(50, 0, 0.05) == pytest.approx(1 - 0.05 ** (1 / 50))
    assert upper_bound(10, 10, 0.05) == 1.0


@given(n=st.integers(1, 400), share=st.floats(0, 1), level=st.floats(0.001, 0.4))
def test_the_bound_is_above_what_was_seen_and_falls_with_more_texts(n: int, share: float, level: float) -> None:
    wrong = round(share * n)

    bound = upper_bound(n, wrong, level)

    assert wrong / n <= bound <= 1.0
    assert upper_bound(2 * n, 2 * wrong, level) <= bound + 1e-12


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_the_target_is_kept_with_the_confidence_that_was_asked_for(seed: int) -> None:
    """Texts whose true risk at each threshold is known: over 200 samples, few thresholds break the target."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.5, 1.0, (200, 300))
    wrong = rng.uniform(size=sure.shape) > sure  # calibrated
    broken = 0
    for s, w in zip(sure, wrong, strict=True):
        answers = s[:, None] >= np.array(TRIED)
        at = threshold_for(answers.sum(axis=0).tolist(), (answers & w[:, None]).sum(axis=0).tolist(), 0.2)
        broken += at != NEVER and (1 - (at + 1) / 2) > 0.2  # the mean of what is above

    assert broken <= 200 * 0.1 + 3 * np.sqrt(200 * 0.1 * 0.9)


def test_the_most_lenient_threshold_that_keeps_the_target_is_taken() -> None:
    answered, wrong = [1000] * N, [200] * 3 + [10] * (N - 3)

    assert threshold_for(answered, wrong, 0.05) == TRIED[3]
    assert threshold_for(answered, [900] * N, 0.05) == NEVER
    assert threshold_for([0] * N, [0] * N, 0.05) == NEVER


def federation(**changes: Any) -> tuple[Federation, Reading]:
    fields: dict[str, Any] = {
        "clients": {"a": 50, "b": 30},
        "labels": LABELS,
        "words": LABELS,
        "instruction": "Which label?",
        "public": (),
        "max_fm_calls": 100,
        "max_prompts": 3,
        "seed": 1,
    }
    reading = Reading(milestone=100, fm_calls=100, prompt=prompt_set("set"), single=SINGLE, stop=10)
    return Federation(**{**fields, **changes}), reading


def test_each_stage_has_its_threshold_from_the_texts_that_reach_it() -> None:
    def answer(round_: Round) -> Mapping[str, Reply]:
        (task, *_) = round_.tasks.values()
        assert isinstance(task, Risk)
        good = 2 if not task.thresholds else 5  # the second stage has to be surer
        half = RiskCounts(n=600, answered=(500,) * N, wrong=(200,) * good + (5,) * (N - good))
        return replies({"a": half, "b": half})

    rounds, cascades = finish(fit_cascade(*federation(), (1.0, 0.5), 0.05), answer)

    assert [r.name for r in rounds] == ["risk", "risk"]
    assert {c: (k.thresholds, k.target, k.single) for c, k in cascades.items()} == dict.fromkeys(
        "ab", ((TRIED[2], TRIED[5]), 0.05, SINGLE)
    )


def test_more_calls_go_into_labelled_texts_that_were_not_scored_yet() -> None:
    counts = RiskCounts(n=1, answered=(1,) * N, wrong=(0,) * N)

    (ask, *_), _ = finish(
        fit_cascade(*federation(), (1.0, 0.5), 0.05, max_fm_calls=30),
        lambda r: replies({"a": counts}) if r.name == "risk" else {},
    )

    # 40 and 20 texts are left, and 30 calls are half of that.
    assert dict(ask.grants) == {"a": 20, "b": 10}
    assert {c: t.stop for c, t in ask.tasks.items() if isinstance(t, Ask)} == {"a": 30, "b": 20}


def test_nobody_who_says_how_often_it_is_wrong() -> None:
    with pytest.raises(RunError, match="at least one"):
        finish(fit_cascade(*federation(), (1.0, 0.5), 0.05), lambda _: replies({"a": Failed(reason="E")}))
