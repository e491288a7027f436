"""``tfidf_logistic`` and ``tfidf_bayes``: words and pairs of words under a linear model, without an encoder.

They see the words themselves: names of drugs, of products, slang, which an encoder that was never trained on them does
not tell apart. Their vocabulary is the client's, so they have no parameters that could be averaged with another's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from promptfed.types import Encoder, FloatArray

# Probability of a label that no training text speaks for.
UNSEEN = 1e-3
_WORDS = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b", "lowercase": True}


class _WordModel(ABC):
    """A text with soft targets is a text for each label, with the target as its weight."""

    def __init__(self, encoder: Encoder, n_labels: int, *, seed: int = 0) -> None:  # noqa: ARG002
        self._n_labels, self._alone = n_labels, np.full(n_labels, 1.0 / n_labels)
        self._vectorizer: Any = None
        self._model: Any = None

    def fit(self, texts: Sequence[str], targets: FloatArray) -> Any:
        self._vectorizer, self._model = self._vectors(), None
        mass = targets.sum(axis=0)
        self._alone = mass / mass.sum() if mass.sum() > 0 else np.full(self._n_labels, 1.0 / self._n_labels)
        try:
            x = self._vectorizer.fit_transform(texts)
        except ValueError:  # not a word in any text
            return self
        row, label = np.nonzero(targets > 0)
        if len(np.unique(label)) > 1:
            self._model = self._classifier().fit(x[row], label, sample_weight=targets[row, label])
        return self

    def predict_proba(self, texts: Sequence[str]) -> FloatArray:
        """Without a model, since there was no word or a single label: how often each label was."""
        out = np.full((len(texts), self._n_labels), UNSEEN)
        if self._model is not None:
            if texts:
                out[:, self._model.classes_] = self._model.predict_proba(self._vectorizer.transform(texts))
        else:
            out += self._alone
        return np.asarray(out / out.sum(axis=1, keepdims=True))

    @property
    def state(self) -> dict[str, Any]:
        """Its vocabulary and numbers, as arrays. The vocabulary is the client's own words."""
        kept: dict[str, Any] = {"alone": self._alone}
        if self._model is not None:
            kept["words"] = np.array(self._vectorizer.get_feature_names_out(), dtype=np.str_)
            kept |= {name: getattr(self._vectorizer, name) for name in ("idf_",) if hasattr(self._vectorizer, name)}
            kept |= {name: getattr(self._model, name) for name in self._numbers}
        return kept

    @state.setter
    def state(self, kept: Mapping[str, Any]) -> None:
        self._alone, self._model = kept["alone"], None
        self._vectorizer = self._vectors()
        if "words" in kept:
            self._vectorizer.set_params(vocabulary={word: i for i, word in enumerate(kept["words"].tolist())})
            if "idf_" in kept:
                self._vectorizer.idf_ = kept["idf_"]
            self._model = self._classifier()
            for name in self._numbers:
                setattr(self._model, name, kept[name])

    @property
    @abstractmethod
    def _numbers(self) -> tuple[str, ...]:
        """The classifier's attributes that it predicts from."""

    @abstractmethod
    def _vectors(self) -> Any: ...

    @abstractmethod
    def _classifier(self) -> Any: ...


class TfidfLogistic(_WordModel):
    """Logistic regression on TF-IDF."""

    _numbers = ("classes_", "coef_", "intercept_")

    def _vectors(self) -> Any:
        return TfidfVectorizer(sublinear_tf=True, **_WORDS)

    def _classifier(self) -> Any:
        return LogisticRegression(C=10.0, max_iter=1000)


class TfidfBayes(_WordModel):
    """Multinomial naive Bayes on which words a text has."""

    _numbers = ("classes_", "feature_log_prob_", "class_log_prior_")

    def _vectors(self) -> Any:
        return CountVectorizer(binary=True, **_WORDS)

    def _classifier(self) -> Any:
        return MultinomialNB(alpha=0.5)
