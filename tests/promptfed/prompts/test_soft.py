"""Soft prompts: what is one, and what is never sent."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from promptfed.errors import ConfigError
from promptfed.messages import Ask, Task, decode_task, encode
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.soft import MAX_NORM, MAX_VECTORS, Projection, check_soft, soft_prompt, vectors_of
from promptfed.prompts.template import PromptTemplate
from promptfed.types import SoftPrompt, SoftSpace


def test_vectors_are_float32_row_by_row() -> None:
    soft = soft_prompt([[1.0, 2.0], [3.0, 0.1]])

    assert (soft.n, soft.hidden) == (2, 2)
    assert soft.data == np.array([1, 2, 3, 0.1], dtype="<f4").tobytes()
    assert vectors_of(soft).tolist() == [[1.0, 2.0], [3.0, float(np.float32(0.1))]]


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(-100, 100, width=32)))
def test_what_is_made_is_what_is_read(vectors: Any) -> None:
    assert check_soft(soft_prompt(vectors), vectors.shape[1]).tolist() == vectors.tolist()


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ([1.0, 2.0], r"shape \(n, hidden\).*got \(2,\)"),
        (np.zeros((0, 4)), r"got \(0, 4\)"),
        (np.zeros((4, 0)), r"got \(4, 0\)"),
        (np.zeros((MAX_VECTORS + 1, 2)), f"1 to {MAX_VECTORS} vectors"),
        ([["a"]], "real numbers"),
        ([[1j]], "real numbers"),
        ([[np.nan, 0.0]], "not finite"),
        ([[np.inf, 0.0]], "not finite"),
        ([[1e300, 0.0]], "not finite"),  # beyond float32
        ([[MAX_NORM, MAX_NORM / 2], [1.0, 1.0]], r"norm 1118; at most 1000"),
    ],
)
def test_anything_else_is_refused(vectors: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        soft_prompt(vectors)


def test_a_soft_prompt_belongs_to_a_width() -> None:
    with pytest.raises(ConfigError, match="vectors of 2 numbers, the model of 3"):
        soft_prompt([[1.0, 2.0]], hidden=3)


@pytest.mark.parametrize("spoilt", [{"data": b"123"}, {"n": 2}, {"hidden": 3}, {"n": 0}, {"hidden": -2}])
def test_bytes_of_another_shape_are_refused(spoilt: dict[str, Any]) -> None:
    soft: SoftPrompt = dataclasses.replace(soft_prompt([[1.0, 2.0]]), **spoilt)

    with pytest.raises(ConfigError, match="bytes"):
        check_soft(soft, soft.hidden)


# ---------------------------------------------------------------- in a prompt


def template() -> PromptTemplate:
    return PromptTemplate(
        text="Text: {text}\nLabel:", words=("bad", "good"), soft=soft_prompt([[0.1, -2.0], [3.0, 0.0]])
    )


def test_a_prompt_with_a_soft_one_is_the_same_in_its_file(tmp_path: Path) -> None:
    prompt = PromptSet(labels=("n", "p"), prompts=(template(),), weights=(1.0,), bias=(0.0, 0.0))

    prompt.save(tmp_path / "prompt.json")

    assert PromptSet.load(tmp_path / "prompt.json") == prompt
    assert PromptSet.load(tmp_path).prompts[0].soft == soft_prompt([[0.1, -2.0], [3.0, 0.0]])


def test_and_on_the_wire() -> None:
    task = Task(
        round=1, client_id="a", run="r", fleet="tuning", grant=2, limit=2, body=Ask(prompts=(template(),), stop=2)
    )

    body = decode_task(encode(task)).body

    assert isinstance(body, Ask)
    assert body.prompts == (template(),)
    assert body.prompts[0].prompt_id == template().prompt_id


def test_the_soft_part_is_asked_and_named() -> None:
    bare = dataclasses.replace(template(), soft=None)

    assert [r.soft for r in template().requests(["x"])] == [template().soft]
    assert template().prompt_id != bare.prompt_id


# ---------------------------------------------------------------- projections


def projection(**changes: Any) -> Projection:
    space = SoftSpace(hidden=16, std=0.5)
    values: dict[str, Any] = {"seed": 1, "dimension": 25, "n_vectors": 40, "scale": 2.0, "sigma": 0.1, **changes}
    return Projection.into(space, **values)


def test_the_spread_of_a_projection_by_hand() -> None:
    assert projection().spread == pytest.approx(2.0 * 0.5 / (5 * 0.1))
    assert projection().start == 0.5


def test_vectors_are_as_large_as_they_are_to_be() -> None:
    rng = np.random.default_rng(0)
    start = projection().vectors(np.zeros(25))

    moved = np.array([projection().vectors(0.1 * rng.standard_normal(25)) - start for _ in range(40)])

    assert start.shape == (40, 16)
    assert start.std() == pytest.approx(0.5, rel=0.1)  # like those of tokens
    assert moved.std() == pytest.approx(2.0 * 0.5, rel=0.1)  # scale times as large


def test_a_projection_is_linear_and_depends_on_its_seed_alone() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 25))
    at = projection().vectors

    assert at(x + 2 * y) - at(x) == pytest.approx(2 * (at(y) - at(0 * y)), abs=1e-4)
    assert at(x).tolist() == projection().vectors(x).tolist()
    assert at(x).tolist() != projection(seed=2).vectors(x).tolist()


@pytest.mark.parametrize("changes", [{"dimension": 1}, {"n_vectors": 0}, {"n_vectors": MAX_VECTORS + 1}])
def test_a_projection_that_makes_no_soft_prompt_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a projection makes 1 to 512 vectors"):
        projection(**changes)


def test_an_intrinsic_vector_that_runs_away_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not finite|norm"):
        projection().soft(np.full(25, 3e38))
