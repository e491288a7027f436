"""The model without weights: what a reader is told about it is what it does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from promptfed.errors import CapabilityError, ConfigError
from promptfed.fm.scripted import ScriptedFM, overlap_rule
from promptfed.prompts.soft import soft_prompt, vectors_of
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FoundationModel, LabelRequest, SoftSpace, TextRequest
from tests.support import wait_for

SPACE = SoftSpace(hidden=2, std=1.0)

HELPFUL = PromptTemplate(
    text="Text: superb lovely\nLabel: good\n\nText: dreadful stale\nLabel: bad\n\nText: {text}\nLabel:",
    words=("bad", "good"),
)


def test_it_is_a_foundation_model() -> None:
    fm = ScriptedFM("mine")

    assert isinstance(fm, FoundationModel)
    assert fm.fm_id == "scripted:mine@0"
    assert fm.capabilities == {Capability.TEXT, Capability.LABEL_LOGPROBS}


def test_the_same_request_has_the_same_answer_whatever_else_is_asked() -> None:
    texts = ["one", "two", "three"]

    alone = [ScriptedFM().score_labels(HELPFUL, [t])[0].tolist() for t in texts]
    together = ScriptedFM().score_labels(HELPFUL, texts[::-1])[::-1]

    assert together.tolist() == alone


def test_each_shared_word_is_worth_two_logits() -> None:
    def difference(text: str) -> float:
        (request,) = HELPFUL.requests([text])
        bad, good = overlap_rule(request)
        return good - bad

    one, two = difference("superb"), difference("superb lovely")

    # The lean of the prompt is the same in both; the noise of a text has standard deviation 0.5 a label.
    assert two - one == pytest.approx(2.0, abs=4 * 0.5 * np.sqrt(2) * np.sqrt(2))
    many = np.mean([difference(f"superb {i}") - difference(f"dreadful {i}") for i in range(200)])
    assert many == pytest.approx(4.0, abs=0.4)


def test_exemplars_with_the_words_of_the_task_help() -> None:
    bare = PromptTemplate(text="Text: {text}\nLabel:", words=("bad", "good"))
    texts = [f"{word} {i}" for i in range(20) for word in ("superb", "lovely", "dreadful", "stale")]
    truth = np.array([1, 1, 0, 0] * 20)

    def accuracy(template: PromptTemplate) -> float:
        scores = np.asarray(ScriptedFM().score_labels(template, texts))
        return float((scores.argmax(axis=1) == truth).mean())

    assert accuracy(HELPFUL) > 0.8
    assert accuracy(HELPFUL) > accuracy(bare) + 0.2


def test_a_rule_of_ones_own() -> None:
    fm = ScriptedFM(rule=lambda request: [0.0, np.log(3.0)])

    assert np.exp(fm.score_labels(HELPFUL, ["x"])[0]).tolist() == pytest.approx([0.25, 0.75])


def test_with_a_soft_space_it_takes_soft_prompts_and_the_rule_sees_them() -> None:
    fm = ScriptedFM(rule=lambda r: [0.0, vectors_of(r.soft)[0, 1] if r.soft else 0.0], soft_space=SPACE)
    soft = replace(HELPFUL, soft=soft_prompt([[5.0, np.log(3.0)]]))

    assert fm.soft_space == SPACE
    assert Capability.PROMPT_EMBEDS in fm.capabilities
    assert np.exp(fm.score_labels(soft, ["x"])[0]).tolist() == pytest.approx([0.25, 0.75])
    assert np.exp(fm.score_labels(HELPFUL, ["x"])[0]).tolist() == pytest.approx([0.5, 0.5])


def test_soft_prompts_that_it_does_not_take_are_refused() -> None:
    soft = replace(HELPFUL, soft=soft_prompt([[5.0, 1.0, 1.0]]))

    with pytest.raises(CapabilityError, match="a soft prompt needs prompt_embeds"):
        ScriptedFM().score_labels(soft, ["x"])
    with pytest.raises(ConfigError, match="vectors of 3 numbers, the model of 2"):
        ScriptedFM(soft_space=SPACE).score_labels(soft, ["x"])


def test_writing_is_seeded() -> None:
    fm = ScriptedFM(phrases=tuple(f"phrase {i}" for i in range(50)))

    def write(prompt: str, seed: int) -> str | None:
        return wait_for(fm.complete([TextRequest(prompt=prompt, max_tokens=9, seed=seed)]))[0].text

    assert write("p", 1) == write("p", 1)
    assert len({write("p", s) for s in range(20)} | {write("q", s) for s in range(20)}) > 15


def test_answers_carry_token_counts() -> None:
    answers = wait_for(
        ScriptedFM(phrases=("two words",)).complete(
            [
                TextRequest(prompt="one two three", max_tokens=5),
                LabelRequest(prefix="a b", text=" c", suffix="", labels=(" x", " y")),
            ]
        )
    )

    assert [(a.prompt_tokens, a.completion_tokens) for a in answers] == [(3, 2), (3, 1)]
    assert answers[1].text is None
    assert answers[0].logprobs is None
