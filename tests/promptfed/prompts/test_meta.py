"""Meta-prompts, letter by letter."""

from __future__ import annotations

from promptfed.prompts.meta import ENDING, next_word_request


def test_labelled_texts_and_what_is_written_so_far() -> None:
    request = next_word_request(
        [("So\ndull.", "negative"), ("Fine.", "positive")], ("Text", "Mood"), "Say the", ("mood", "rest")
    )

    assert request.text == f"Text: So dull.\nMood: negative\n\nText: Fine.\nMood: positive\n\n{ENDING} Say the"
    assert request.labels == (" mood", " rest")
    assert (request.prefix, request.suffix) == ("", "")


def test_without_texts_and_words_the_ending_alone() -> None:
    assert next_word_request((), ("Text", "Mood"), "", ("a",)).text == ENDING
