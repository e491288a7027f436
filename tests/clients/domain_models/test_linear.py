"""The linear head against scikit-learn, and the domain model on top of it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clients.domain_models.linear import PENALTY, LinearDomainModel, LinearHead
from promptfed.types import DomainModel, FloatArray, IntArray
from tests.contracts.domain_model import DomainModelContract, encoder


def blobs(n: int, n_labels: int, dimension: int = 6, seed: int = 0) -> tuple[FloatArray, IntArray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_labels
    centres = rng.normal(size=(n_labels, dimension))
    return centres[labels] + rng.normal(size=(n, dimension)), labels


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("n_labels", [3, 5])
def test_the_head_is_scikit_learns_with_c_the_inverse_penalty(n_labels: int) -> None:
    x, labels = blobs(60, n_labels)
    fresh, _ = blobs(30, n_labels, seed=1)

    ours = LinearHead(n_labels).fit(x, np.eye(n_labels)[labels], max_iter=2000)
    theirs = LogisticRegression(C=1 / PENALTY, tol=1e-8, max_iter=5000).fit(x, labels)

    assert ours.predict_proba(fresh) == pytest.approx(theirs.predict_proba(fresh), abs=2e-3)


def test_with_two_labels_it_is_scikit_learns_with_twice_the_c() -> None:
    """PENALTY/2 |W|^2 over two rows: W = (-w/2, w/2) has half the square of scikit-learn's single w: C = 2/PENALTY."""
    x, labels = blobs(60, 2)
    fresh, _ = blobs(30, 2, seed=1)

    ours = LinearHead(2).fit(x, np.eye(2)[labels], max_iter=2000)
    theirs = LogisticRegression(C=2 / PENALTY, tol=1e-8, max_iter=5000).fit(x, labels)

    assert ours.predict_proba(fresh) == pytest.approx(theirs.predict_proba(fresh), abs=2e-3)


def test_soft_targets_are_weighted_examples() -> None:
    x, labels = blobs(30, 3)
    soft = 0.7 * np.eye(3)[labels] + 0.1  # 0.8 for the label, 0.1 for each other

    ours = LinearHead(3).fit(x, soft, max_iter=2000)
    theirs = LogisticRegression(C=1 / PENALTY, tol=1e-8, max_iter=5000).fit(
        np.repeat(x, 3, axis=0), np.tile(np.arange(3), 30), sample_weight=soft.ravel()
    )

    assert ours.predict_proba(x) == pytest.approx(theirs.predict_proba(x), abs=2e-3)


# ---------------------------------------------------------------- the head


def test_an_unfitted_head_is_uniform() -> None:
    assert LinearHead(4).predict_proba(np.ones((2, 3))).tolist() == [[0.25] * 4] * 2


def test_flat_weights_by_hand() -> None:
    # W = [[1, 0], [0, 2]], b = [0, log 3]
    head = LinearHead(2, np.array([1.0, 0.0, 0.0, 2.0, 0.0, np.log(3.0)]))

    proba = head.predict_proba(np.array([[0.0, 0.0], [np.log(3.0), 0.0]]))

    # Logits (0, log 3): 1/4 and 3/4. Logits (log 3, log 3): even.
    assert proba == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]))


def test_fitting_starts_from_the_weights_that_it_has() -> None:
    x, labels = blobs(60, 3)
    targets = np.eye(3)[labels]
    done = LinearHead(3).fit(x, targets, max_iter=2000)
    assert done.flat is not None

    again = LinearHead(3, done.flat).fit(x, targets, max_iter=1)
    short = LinearHead(3).fit(x, targets, max_iter=1)

    assert again.predict_proba(x) == pytest.approx(done.predict_proba(x), abs=1e-3)
    assert np.abs(short.predict_proba(x) - done.predict_proba(x)).max() > 0.05


def test_a_single_class_is_learnt_without_blowing_up() -> None:
    x = np.ones((5, 2))

    proba = LinearHead(2).fit(x, np.eye(2)[[0] * 5]).predict_proba(x)

    assert np.isfinite(proba).all()
    assert (proba[:, 0] > 0.9).all()


# ---------------------------------------------------------------- the domain model


class TestLinear(DomainModelContract):
    averageable = True

    def model(self, n_labels: int = 2, seed: int = 0) -> DomainModel:
        return LinearDomainModel(encoder(), n_labels, seed=seed)
