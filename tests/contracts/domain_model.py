"""What every domain model has to keep. Subclass `DomainModelContract` in the model's own test module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from clients.domain_models.base import Averageable, out_of_fold
from promptfed.types import DomainModel, FloatArray
from tests.support import CHEERFUL, GLOOMY, WordEncoder, sentences

EYE = np.eye(2)


class DomainModelContract:
    """``averageable``: whether it has parameters that clients may average. ``held_out``: what it has to get right."""

    averageable: ClassVar[bool] = False
    held_out: ClassVar[float] = 0.8

    def model(self, n_labels: int = 2, seed: int = 0) -> DomainModel:
        raise NotImplementedError

    def fitted(self, n: int = 40, seed: int = 0) -> tuple[DomainModel, Sequence[str], FloatArray]:
        data = sentences(n, seed)
        return self.model().fit(data.texts, EYE[data.labels]), data.texts, EYE[data.labels]

    def test_it_learns_which_words_speak_for_which_label(self) -> None:
        model, _, _ = self.fitted()
        held_out = sentences(40, 7)

        proba = model.predict_proba(held_out.texts)

        assert proba.shape == (40, 2)
        assert proba.sum(axis=1) == pytest.approx(np.ones(40))
        assert (proba.argmax(axis=1) == held_out.labels).mean() > self.held_out

    def test_soft_targets_make_soft_predictions(self) -> None:
        data = sentences(60)
        soft = 0.4 * EYE[data.labels] + 0.3  # 0.7 and 0.3

        hard = self.model().fit(data.texts, EYE[data.labels]).predict_proba(data.texts)
        softer = self.model().fit(data.texts, soft).predict_proba(data.texts)

        assert softer.max(axis=1).mean() < hard.max(axis=1).mean()
        assert (softer.argmax(axis=1) == data.labels).mean() > 0.8

    def test_a_text_without_weight_teaches_nothing(self) -> None:
        data = sentences(40)
        with_more = [*data.texts, *[f"{CHEERFUL[0]} {CHEERFUL[1]}"] * 30]

        plain = self.model().fit(data.texts, EYE[data.labels]).predict_proba(data.texts)
        same = self.model().fit(with_more, np.vstack([EYE[data.labels], np.zeros((30, 2))])).predict_proba(data.texts)

        assert np.abs(same - plain).mean() < 0.1

    def test_without_any_text_all_labels_are_as_likely(self) -> None:
        model = self.model(n_labels=3).fit([], np.zeros((0, 3)))

        assert model.predict_proba(["a text", "another"]) == pytest.approx(np.full((2, 3), 1 / 3))

    def test_fitting_anew_forgets_what_was_before(self) -> None:
        data = sentences(40)
        fresh = self.model().fit(data.texts, EYE[data.labels]).predict_proba(data.texts)

        model = self.model().fit(data.texts, EYE[1 - data.labels])
        model.fit(data.texts, EYE[data.labels])

        assert model.predict_proba(data.texts) == pytest.approx(fresh)

    def test_the_same_seed_is_the_same_model(self) -> None:
        one, texts, _ = self.fitted()
        other, _, _ = self.fitted()

        assert np.array_equal(one.predict_proba(texts), other.predict_proba(texts))

    @pytest.mark.parametrize("n_labels", [2, 5])
    def test_little_to_learn_from_is_no_error(self, n_labels: int) -> None:
        """No fit at all, one text, one label, a label that never occurs, texts without a word."""
        eye = np.eye(n_labels)
        unfitted = self.model(n_labels)
        cases = [
            (["good"], eye[[1]]),
            (["good", "fine"], eye[[1, 1]]),
            (["good", "bad"], eye[[1, 0]]),
            (["", " "], eye[[0, 1]]),
        ]

        assert unfitted.predict_proba(["good", ""]) == pytest.approx(np.full((2, n_labels), 1 / n_labels))
        for texts, targets in cases:
            proba = self.model(n_labels).fit(texts, targets).predict_proba(["good", "", "other"])
            assert proba.shape == (3, n_labels)
            assert np.isfinite(proba).all()
            assert proba.sum(axis=1) == pytest.approx(np.ones(3))
        assert self.model(n_labels).fit(["good", "bad"], eye[[1, 0]]).predict_proba([]).shape == (0, n_labels)

    def test_out_of_fold_does_not_know_a_texts_own_target(self) -> None:
        data = sentences(30)
        flipped = EYE[data.labels].copy()
        flipped[4] = flipped[4][::-1]

        before = out_of_fold(self.model, data.texts, EYE[data.labels])
        after = out_of_fold(self.model, data.texts, flipped)

        own_fold = np.arange(30) % 5 == 4
        assert after[own_fold] == pytest.approx(before[own_fold])
        assert np.abs(after[~own_fold] - before[~own_fold]).max() > 1e-6

    def test_parameters_are_there_or_not_as_it_says(self) -> None:
        assert isinstance(self.model(), Averageable) == self.averageable

    def test_training_leaves_the_parameters_until_they_are_set(self) -> None:
        model = self.model()
        if not isinstance(model, Averageable):
            return
        data = sentences(40)
        before = model.parameters.copy()

        after = model.trained(data.texts, EYE[data.labels], n_steps=20)

        assert np.array_equal(model.parameters, before)
        assert (model.predict_proba(data.texts).argmax(axis=1) == data.labels).mean() < 0.8
        model.parameters = after
        assert (model.predict_proba(data.texts).argmax(axis=1) == data.labels).mean() > 0.9

    def test_a_proximal_term_keeps_it_near_where_it_started(self) -> None:
        model = self.model()
        if not isinstance(model, Averageable):
            return
        data = sentences(40)
        free, held = (
            model.trained(data.texts, EYE[data.labels], n_steps=50, proximal=proximal) for proximal in (0.0, 10.0)
        )

        start = model.parameters
        assert np.linalg.norm(held - start) < 0.3 * np.linalg.norm(free - start)

    def test_the_mean_of_two_clients_parameters_knows_what_both_know(self) -> None:
        """One saw gloomy texts of half of the words only, the other those of the other half."""
        model = self.model()
        if not isinstance(model, Averageable):
            return
        halves = [[f"so {word} it is" for word in (*CHEERFUL[start::2], *GLOOMY[start::2])] for start in (0, 1)]
        labels = [[1] * len(CHEERFUL[start::2]) + [0] * len(GLOOMY[start::2]) for start in (0, 1)]

        for _ in range(5):
            parts = [model.trained(t, EYE[y], n_steps=10) for t, y in zip(halves, labels, strict=True)]
            model.parameters = np.mean(parts, axis=0)

        for texts, mine in zip(halves, labels, strict=True):
            assert (model.predict_proba(texts).argmax(axis=1) == mine).mean() > 0.9


def encoder() -> WordEncoder:
    return WordEncoder()
