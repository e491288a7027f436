"""The linear head against scikit-learn, and the domain model on top of it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clients.data import Labelled
from clients.domain import PENALTY, LinearDomainModel, LinearHead, out_of_fold, smoothed
from promptfed.types import FloatArray, IntArray
from tests.support import CHEERFUL, GLOOMY, WordEncoder


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


def test_the_domain_model_learns_words(encoder: WordEncoder, reviews: Labelled) -> None:
    model = LinearDomainModel(encoder, 2).fit(reviews.texts, np.eye(2)[reviews.labels])

    proba = model.predict_proba([f"So {CHEERFUL[0]}!", f"So {GLOOMY[0]}!"])

    assert proba.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert proba.argmax(axis=1).tolist() == [1, 0]


def test_fitting_anew_forgets_what_was_before(encoder: WordEncoder, reviews: Labelled) -> None:
    targets = np.eye(2)[reviews.labels]
    model = LinearDomainModel(encoder, 2).fit(reviews.texts, targets[:, ::-1])

    model.fit(reviews.texts, targets)

    assert (model.predict_proba(reviews.texts).argmax(axis=1) == reviews.labels).mean() > 0.9


# ---------------------------------------------------------------- out of fold


def test_out_of_fold_never_sees_its_own_label() -> None:
    x, labels = blobs(23, 2)
    flipped = labels.copy()
    flipped[4] = 1 - flipped[4]

    before, after = out_of_fold(x, np.eye(2)[labels]), out_of_fold(x, np.eye(2)[flipped])

    same_fold = np.arange(23) % 5 == 4
    assert after[same_fold] == pytest.approx(before[same_fold])
    assert np.abs(after[~same_fold] - before[~same_fold]).max() > 1e-3


def test_out_of_fold_equals_a_head_on_the_rest() -> None:
    x, labels = blobs(10, 2)
    targets = np.eye(2)[labels]
    held = np.arange(10) % 5 == 1

    assert out_of_fold(x, targets)[held] == pytest.approx(
        LinearHead(2).fit(x[~held], targets[~held]).predict_proba(x[held])
    )


def test_fewer_texts_than_folds_leave_each_out_alone() -> None:
    x, labels = blobs(3, 3)
    targets = np.eye(3)[labels]

    got = out_of_fold(x, targets)

    # The label of the text left out never occurs among the rest.
    assert got[0] == pytest.approx(LinearHead(3).fit(x[1:], targets[1:]).predict_proba(x[:1])[0])
    assert got.argmax(axis=1).tolist() != labels.tolist()


def test_a_single_text_gets_the_uniform_prediction() -> None:
    assert out_of_fold(np.ones((1, 2)), np.array([[1.0, 0.0]])).tolist() == [[0.5, 0.5]]


def test_smoothed_is_finite() -> None:
    assert smoothed(np.array([[0.0, 1.0]])) == pytest.approx(np.array([[np.log(1e-4), 0.0]]))
