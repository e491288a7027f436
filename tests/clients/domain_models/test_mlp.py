"""The adapter with a hidden layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.special import log_softmax

from clients.domain_models import mlp
from clients.domain_models.linear import LinearDomainModel
from clients.domain_models.mlp import MLPDomainModel
from promptfed.types import DomainModel, FloatArray
from tests.contracts.domain_model import DomainModelContract, encoder


class TestMLP(DomainModelContract):
    averageable = True

    def model(self, n_labels: int = 2, seed: int = 0) -> DomainModel:
        return MLPDomainModel(encoder(), n_labels, seed=seed)


class Points:
    """An encoder of texts like "0.5 -1"."""

    encoder_id = "points"

    def encode(self, texts: Sequence[str]) -> FloatArray:
        return np.array([[float(x) for x in text.split()] for text in texts]).reshape(len(texts), 2)


XOR = ["1 1", "-1 -1", "1 -1", "-1 1"] * 10
XOR_TARGETS = np.eye(2)[[0, 0, 1, 1] * 10]


def test_it_learns_what_no_linear_model_can() -> None:
    linear = LinearDomainModel(Points(), 2).fit(XOR, XOR_TARGETS).predict_proba(XOR)
    model = MLPDomainModel(Points(), 2).fit(XOR, XOR_TARGETS).predict_proba(XOR)

    assert linear == pytest.approx(np.full((40, 2), 0.5), abs=1e-3)
    assert (model.argmax(axis=1) == XOR_TARGETS.argmax(axis=1)).all()


def test_it_ends_where_the_gradient_of_its_loss_is_nothing() -> None:
    """The loss written out once more, its gradient by differences."""
    model = MLPDomainModel(Points(), 2, n_hidden=3)
    first = model.parameters.copy()
    model.fit(XOR, XOR_TARGETS)

    def loss(flat: FloatArray) -> float:
        u, c, v, w, b = (
            flat[:6].reshape(3, 2),
            flat[6:9],
            flat[9:15].reshape(2, 3),
            flat[15:19].reshape(2, 2),
            flat[19:],
        )
        x = Points().encode(XOR)
        logp = log_softmax(x @ w.T + b + np.tanh(x @ u.T + c) @ v.T, axis=1)
        penalty = ((u - first[:6].reshape(3, 2)) ** 2).sum() + (v**2).sum() + (w**2).sum()
        return float(-(XOR_TARGETS * logp).sum() + mlp.PENALTY / 2 * penalty)

    assert np.abs(approx_fprime(model.parameters, loss, 1e-6)).max() < 0.02
    assert loss(model.parameters) < loss(first)


def test_clients_with_the_same_seed_start_alike() -> None:
    assert np.array_equal(
        MLPDomainModel(Points(), 2, seed=3).parameters, MLPDomainModel(Points(), 2, seed=3).parameters
    )
    assert not np.array_equal(
        MLPDomainModel(Points(), 2, seed=3).parameters, MLPDomainModel(Points(), 2, seed=4).parameters
    )
