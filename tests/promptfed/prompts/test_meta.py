"""Meta-prompts, letter by letter."""

from __future__ import annotations

from promptfed.prompts.meta import next_word_request


def test_labelled_texts_and_what_is_written_so_far() -> None:
    pairs = [("So\ndull.", "negative"), ("Fine.", "positive")]

    request = next_word_request(pairs, ("Text", "Mood"), ["Judge it."], "Say the", ("mood", "rest"))

    blocks = ["Text: So dull.\nMood: negative", "Text: Fine.\nMood: positive", "Instruction: Judge it."]
    assert request.text == "\n\n".join(blocks) + "\nInstruction: Say the"
    assert request.labels == (" mood", " rest")
    assert (request.prefix, request.suffix) == ("", "")


def test_without_texts_and_words_the_opening_alone() -> None:
    assert next_word_request((), ("Text", "Mood"), (), "", ("a",)).text == "Instruction:"
