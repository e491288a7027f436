"""Kinds by name, and predictions of models that have not seen a text."""

from __future__ import annotations

import numpy as np
import pytest

from clients.domain_models.base import make_domain_model, out_of_fold, smoothed
from clients.domain_models.linear import LinearDomainModel
from promptfed.errors import UnknownNameError
from promptfed.types import FloatArray
from tests.support import WordEncoder

TEXTS = ("good one", "bad one", "good two", "bad two", "good three", "bad three", "good four")
TARGETS = np.eye(2)[[1, 0, 1, 0, 1, 0, 1]]


def linear() -> LinearDomainModel:
    return LinearDomainModel(WordEncoder(), 2)


def predicted(rows: list[int], of: list[int]) -> FloatArray:
    model = linear().fit([TEXTS[i] for i in rows], TARGETS[rows])
    return model.predict_proba([TEXTS[i] for i in of])


def test_out_of_fold_equals_a_model_on_the_rest() -> None:
    got = out_of_fold(linear, TEXTS, TARGETS)

    assert got[[1, 6]] == pytest.approx(predicted([0, 2, 3, 4, 5], [1, 6]))


def test_fewer_texts_than_folds_leave_each_out_alone() -> None:
    got = out_of_fold(linear, TEXTS[:3], TARGETS[:3])

    assert got[[0]] == pytest.approx(predicted([1, 2], [0]))


def test_a_single_text_gets_the_uniform_prediction() -> None:
    assert out_of_fold(linear, TEXTS[:1], TARGETS[:1]).tolist() == [[0.5, 0.5]]
    assert out_of_fold(linear, (), TARGETS[:0]).shape == (0, 2)


def test_smoothed_is_finite() -> None:
    assert smoothed(np.array([[0.0, 1.0]])) == pytest.approx(np.array([[np.log(1e-4), 0.0]]))


def test_a_kind_that_is_not_registered_is_told_those_that_are() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown domain model 'linar'; known: .*did you mean 'linear'"):
        make_domain_model("linar", WordEncoder(), 2)
