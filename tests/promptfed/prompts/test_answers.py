"""What counts as the same answer, and votes over answers."""

from __future__ import annotations

import pytest

from promptfed.prompts.answers import first_line, normalised, vote


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The Red  Lamp.", "red lamp"),
        ("an Apple a day", "apple day"),
        ("1,240 euros", "1240 euros"),
        ("A-48213", "a48213"),  # the article is looked for once punctuation is gone
        ("theatre", "theatre"),
        ("  ", ""),
    ],
)
def test_normalised_by_hand(answer: str, plain: str) -> None:
    assert normalised(answer) == plain


def test_the_answer_is_the_first_line_with_something_in_it() -> None:
    assert first_line("\n  Ada Berger \nText: and so on") == "Ada Berger"
    assert first_line("") == ""


def test_most_weight_wins_and_equals_go_to_the_first() -> None:
    assert vote(["red lamp", "Blue lamp", "The blue lamp."], [0.4, 0.3, 0.3]) == "Blue lamp"
    assert vote(["red lamp", "blue lamp"], [0.5, 0.5]) == "red lamp"
    assert vote(["red", "blue", "blue"], [0.7, 0.2, 0.1]) == "red"


def test_who_failed_has_no_say() -> None:
    assert vote([None, "blue"], [0.9, 0.1]) == "blue"
    assert vote([None, None], [0.5, 0.5]) is None
    assert vote([], []) is None
