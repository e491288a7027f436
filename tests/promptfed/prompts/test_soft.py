"""Soft prompts: what is one, and what is never sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from promptfed.errors import ConfigError
from promptfed.prompts.soft import MAX_NORM, MAX_VECTORS, check_soft, soft_prompt, vectors_of
from promptfed.types import SoftPrompt


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
