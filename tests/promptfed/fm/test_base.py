"""Label scoring that every model shares, blocking and not."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from promptfed.errors import CapabilityError, ConfigError
from promptfed.fm.base import run_sync
from promptfed.fm.scripted import ScriptedFM
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability
from tests.support import CountingFM, FailingFM, wait_for

TEMPLATE = PromptTemplate(text="Text: {text}\nLabel:", words=("bad", "good", "so-so"))


def test_scores_are_normalised_log_probabilities() -> None:
    scores = ScriptedFM().score_labels(TEMPLATE, ["one", "two"])

    assert scores.shape == (2, 3)
    assert scores.dtype == np.float64
    assert np.exp(np.asarray(scores)).sum(axis=1) == pytest.approx([1.0, 1.0])
    assert not np.ma.getmaskarray(scores).any()


def test_raw_text_with_labels_is_a_template() -> None:
    fm = ScriptedFM()

    assert np.array_equal(
        fm.score_labels("Text: {text}\nLabel:", ["one"], ["bad", "good", "so-so"]), fm.score_labels(TEMPLATE, ["one"])
    )


def test_raw_text_without_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="label words"):
        ScriptedFM().score_labels("Text: {text}", ["one"])


def test_no_text_no_score_and_no_call() -> None:
    fm = CountingFM(ScriptedFM())

    assert fm.score_labels(TEMPLATE, []).shape == (0, 3)
    assert fm.n_calls == 0


def test_failed_rows_are_masked_and_uniform_underneath() -> None:
    scores = FailingFM().score_labels(TEMPLATE, ["one", "two"])

    assert np.ma.getmaskarray(scores).all()
    assert scores.data == pytest.approx(np.full((2, 3), -np.log(3)))


def test_an_error_of_the_model_is_raised() -> None:
    with pytest.raises(RuntimeError, match="down"):
        FailingFM(RuntimeError("down")).score_labels(TEMPLATE, ["one"])


def test_a_model_without_label_scores_is_refused_before_the_first_call() -> None:
    fm = CountingFM(ScriptedFM("writer", capabilities=frozenset({Capability.TEXT})))

    with pytest.raises(CapabilityError, match=r"score_labels needs label_choice.*scripted:writer@0 offers text"):
        fm.score_labels(TEMPLATE, ["one"])

    assert fm.n_calls == 0


def test_a_model_that_can_do_nothing_says_so() -> None:
    with pytest.raises(CapabilityError, match="offers nothing"):
        ScriptedFM(capabilities=frozenset()).require(Capability.TEXT, "method 'race'")


# ---------------------------------------------------------------- blocking calls


def test_blocking_and_awaited_calls_agree() -> None:
    fm = ScriptedFM()

    assert np.array_equal(fm.score_labels(TEMPLATE, ["one"]), wait_for(fm.ascore_labels(TEMPLATE, ["one"])))


def test_a_blocking_call_works_inside_a_running_loop() -> None:
    fm = ScriptedFM()
    expected = fm.score_labels(TEMPLATE, ["one", "two"])

    async def notebook() -> Any:
        return fm.score_labels(TEMPLATE, ["one", "two"])

    assert np.array_equal(asyncio.run(notebook()), expected)


def test_an_error_inside_a_running_loop_reaches_the_caller() -> None:
    async def notebook() -> Any:
        return FailingFM(KeyError("down")).score_labels(TEMPLATE, ["one"])

    with pytest.raises(KeyError, match="down"):
        asyncio.run(notebook())


def test_run_sync_uses_a_thread_only_where_a_loop_runs() -> None:
    async def here() -> int:
        return threading.get_ident()

    async def inside() -> int:
        return run_sync(here())

    assert run_sync(here()) == threading.get_ident()
    assert asyncio.run(inside()) != threading.get_ident()


def test_run_sync_leaves_no_thread_behind() -> None:
    async def nothing() -> None:
        return None

    async def inside() -> None:
        run_sync(nothing())

    before = threading.active_count()
    asyncio.run(inside())

    assert threading.active_count() == before
