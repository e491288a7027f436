"""Models on words, against scikit-learn as one would use it by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from clients.domain_models.tfidf import UNSEEN, TfidfBayes, TfidfLogistic
from promptfed.types import DomainModel
from tests.contracts.domain_model import DomainModelContract, encoder
from tests.support import sentences


class TestLogistic(DomainModelContract):
    def model(self, n_labels: int = 2, seed: int = 0) -> DomainModel:
        return TfidfLogistic(encoder(), n_labels, seed=seed)


class TestBayes(DomainModelContract):
    def model(self, n_labels: int = 2, seed: int = 0) -> DomainModel:
        return TfidfBayes(encoder(), n_labels, seed=seed)


def test_hard_targets_are_scikit_learns() -> None:
    data, fresh = sentences(40), sentences(10, 5)

    ours = TfidfLogistic(encoder(), 2).fit(data.texts, np.eye(2)[data.labels]).predict_proba(fresh.texts)

    vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    x = vectors.fit_transform(data.texts)
    theirs = LogisticRegression(C=10.0, max_iter=1000).fit(x, data.labels).predict_proba(vectors.transform(fresh.texts))
    assert ours == pytest.approx(theirs)


def test_bayes_by_hand() -> None:
    """Four different words and pairs in all ("good", "bad", "good good", "bad bad" do not count twice): with 1/2 added
    to each of the two words, P(good | 1) is (1 + .5) / (1 + 1) = 3/4, and P(good | 0) is .5 / 2 = 1/4."""
    model = TfidfBayes(encoder(), 2).fit(["good", "bad"], np.eye(2)[[1, 0]])

    assert model.predict_proba(["good"]) == pytest.approx(np.array([[0.25, 0.75]]))


def test_a_label_that_never_occurred_is_unlikely_and_not_impossible() -> None:
    model = TfidfLogistic(encoder(), 3).fit(["good", "bad"], np.eye(3)[[1, 0]])

    proba = model.predict_proba(["good"])[0]

    assert proba[2] == pytest.approx(UNSEEN / (1 + UNSEEN))
    assert proba[1] > proba[0] > proba[2]


def test_a_single_label_is_its_share() -> None:
    proba = TfidfLogistic(encoder(), 2).fit(["a", "b"], np.eye(2)[[1, 1]]).predict_proba(["c"])[0]

    assert proba == pytest.approx([UNSEEN / (1 + 2 * UNSEEN), (1 + UNSEEN) / (1 + 2 * UNSEEN)])
