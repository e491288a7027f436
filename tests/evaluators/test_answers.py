"""Metrics of written answers, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators.answers import METRICS, PRIMARY, exact_match, per_text, token_f1, with_errors


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact"),
    [
        ("Ada Berger", "Ada Berger", 1.0, 1.0),
        ("the Red lamp!", "red lamp", 1.0, 1.0),
        ("Ada", "Ada Berger", 2 / 3, 0.0),  # precision 1, recall 1/2
        ("It is Ada Berger", "Ada Berger", 2 / 3, 0.0),  # precision 2/4, recall 1
        ("lamp lamp", "red lamp", 0.5, 0.0),  # a word counts as often as it stands in both
        ("no", "Ada Berger", 0.0, 0.0),
        ("", "Ada", 0.0, 0.0),
        ("the", "", 1.0, 1.0),  # no words on either side
    ],
)
def test_f1_and_exact_match_by_hand(answer: str, reference: str, f1: float, exact: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert token_f1(reference, answer) == pytest.approx(f1)
    assert exact_match(answer, reference) == exact


def test_a_failed_answer_is_worth_nothing_and_errors_are_those_of_a_mean() -> None:
    values = per_text(["Ada", None, "Ada", None], ["Ada"] * 4)
    means, errors = with_errors(values)

    assert PRIMARY in METRICS
    assert values["token_f1"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert means == {"token_f1": 0.5, "exact_match": 0.5}
    assert errors["token_f1"] == pytest.approx(0.5 / np.sqrt(4))
