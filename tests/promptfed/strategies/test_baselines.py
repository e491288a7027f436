"""Baselines: prompts that are given, not searched for."""

from __future__ import annotations

import pytest

from promptfed.errors import ConfigError
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Federation
from promptfed.strategies.baselines import Given, manual_prompt, zero_shot_prompt
from tests.support import LABELS, bench

P = PromptTemplate(text="It seems superb.\nLabel: positive\n\nText: {text}\nLabel:", words=LABELS)


def federation(labels: tuple[str, ...] = LABELS, instruction: str = "Judge.") -> Federation:
    return Federation(
        clients={"a": 5},
        labels=labels,
        words=labels,
        instruction=instruction,
        public=(),
        max_fm_calls=10,
        max_prompts=1,
        seed=1,
    )


def test_a_given_prompt_is_scored_and_calibrated_for_so_many_calls() -> None:
    scene = bench(2, 10)

    prompt = scene.drive(Given([P], 6).run(scene.federation(max_fm_calls=12)), 12)

    assert prompt.prompts == (P,)
    assert scene.fm.n_calls == 12
    assert prompt.weights[0] > 0


def test_zero_shot_is_the_instruction_and_an_empty_form() -> None:
    assert zero_shot_prompt(federation()).text == "Judge.\n\nText: {text}\nLabel:"
    assert zero_shot_prompt(federation(instruction="")).text == "Text: {text}\nLabel:"
    assert zero_shot_prompt(federation()).words == LABELS


def test_the_projects_own_prompt_labels_its_exemplars_rightly_in_any_order_of_labels() -> None:
    for labels in (LABELS, LABELS[::-1]):
        template = manual_prompt(federation(labels), None)

        assert "Text: I loved it.\nSentiment: positive\n" in template.text
        assert "Text: It was awful.\nSentiment: negative\n" in template.text
        assert template.words == labels


def test_a_given_text_is_used_as_it_is() -> None:
    assert manual_prompt(federation(), "Say: {text} =").text == "Say: {text} ="


def test_a_given_text_without_a_slot_is_refused() -> None:
    with pytest.raises(ConfigError, match="slot"):
        manual_prompt(federation(), "Say:")


def test_other_labels_need_a_prompt_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"manual_prompt"):
        manual_prompt(federation(("sports", "politics")), None)
