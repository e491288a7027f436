"""What the FM is asked about instructions, and how what it writes is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfed.prompts.feedback import (
    MAX_SHOWN,
    critique_prompt,
    merge_prompt,
    read_instruction,
    rewrite_prompt,
    rewritten,
    sentences,
)
from promptfed.prompts.grammar import Draft
from promptfed.prompts.template import SLOT, PromptTemplate

WORDS = ("bad", "good")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Say whether it is good.", "Say whether it is good."),
        ("<instruction>Say whether\nit is good.</instruction> More.", "Say whether it is good."),
        ("Sure! <Instruction> Say whether it is good.", "Say whether it is good."),  # the end tag is missing
        ("<instruction></instruction>\nSay whether it is good.", "Say whether it is good."),
        ('\n\n- **Better instruction:** "Say whether it is good."\nAnd so on.', "Say whether it is good."),
        ("Answer: Say whether it is good", "Say whether it is good"),
        ("Yes.\n1.\nSay whether it is good.", "Say whether it is good."),  # a usable line has three words
        ("Look at the {text} again.\nSay whether it is good.", "Say whether it is good."),  # the slot is ours
        ("Say whether it is good. Look at each and ev", "Say whether it is good."),  # cut off
        ("Say whether it is really very good", "Say whether it is really"),  # at most five words, below
        ("", ""),
        ("42 17 3", ""),
    ],
)
def test_an_instruction_is_found_in_what_a_weak_model_writes(written: str, read: str) -> None:
    assert read_instruction(written, 5) == read


@given(st.text(), st.integers(1, 20))
def test_what_is_read_can_stand_in_a_prompt_and_is_read_again_as_it_is(written: str, max_words: int) -> None:
    read = read_instruction(written, max_words)

    assert len(read.split()) <= max_words
    assert SLOT not in read
    assert "\n" not in read


def test_an_instruction_is_replaced_where_it_stands() -> None:
    draft = Draft(instruction="Be old.", fields=("Text", "Label"), exemplars=(("Be old.", 0),), words=WORDS)

    new = rewritten(draft.template(), "Be old.", "Be new.")

    assert new.text == "Be new.\n\nText: Be old.\nLabel: bad\n\nText: {text}\nLabel:"
    assert rewritten(new, "Be new.", "Be old.") == draft.template()


def test_where_there_was_none_it_comes_first() -> None:
    template = PromptTemplate(text="Text: {text}\nLabel:", words=WORDS)

    assert rewritten(template, "", "Be new.").text == "Be new.\n\nText: {text}\nLabel:"


def test_what_does_not_begin_the_prompt_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match="begin"):
        rewritten(PromptTemplate(text="Text: {text}", words=WORDS), "Be old.", "Be new.")


def test_mistakes_are_shown_on_one_line_each_and_not_at_any_length() -> None:
    prompt = critique_prompt("Judge it.", WORDS, [("Two\nlines", "bad", "good"), ("x" * 1000, "good", "bad")])

    assert "Text: Two lines\nRight answer: bad\nAnswer given: good\n" in prompt
    assert "x" * MAX_SHOWN in prompt
    assert "x" * (MAX_SHOWN + 1) not in prompt


def test_all_prompts_name_the_label_words_and_what_is_to_be_changed() -> None:
    prompts = [
        critique_prompt("Judge it.", WORDS, []),
        rewrite_prompt("Judge it.", WORDS, "It is vague.", 30),
        merge_prompt(["Judge it.", "Read it."], WORDS, "uid", 30),
    ]

    assert all("bad, good" in prompt and "Judge it." in prompt for prompt in prompts)
    assert "What it lacks: It is vague.\n" in prompts[1]


def test_where_answers_are_written_no_prompt_speaks_of_labels_and_the_question_is_shown() -> None:
    prompts = [
        critique_prompt("Judge it.", (), [("x" * 1000 + " Who?", "Ada", "It is Ada.")]),
        rewrite_prompt("Judge it.", (), "It is vague.", 30),
        merge_prompt(["Judge it.", "Read it."], (), "uid", 30),
    ]

    assert not [prompt for prompt in prompts if "one of" in prompt or "label" in prompt]
    assert all("in a few words" in prompt and "Judge it." in prompt for prompt in prompts)
    shown = "x" * (MAX_SHOWN - 5) + " Who?"
    assert f"Text: {shown}\nRight answer: Ada\nAnswer given: It is Ada.\n" in prompts[0]


def test_uniform_information_density_is_asked_for_by_its_name_only() -> None:
    plain, uid = (merge_prompt(["Judge it.", "Read it."], WORDS, how, 30) for how in ("summarise", "uid"))

    assert "evenly" in uid
    assert "evenly" not in plain


def test_sentences_by_hand() -> None:
    assert sentences("Read it. Is it good? Say so!\n- A rule\n* Another.") == [
        "Read it.",
        "Is it good?",
        "Say so!",
        "A rule",
        "Another.",
    ]
