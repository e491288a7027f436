"""Baselines as methods: prompts that are given, not searched for, and scored so that they can be calibrated."""

from __future__ import annotations

from collections.abc import Sequence

from promptfed.errors import ConfigError
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Card, Federation, Steps
from promptfed.strategies.session import Session
from promptfed.types import Capability

MANUAL_INSTRUCTION = "Classify the sentiment of the text as positive or negative."
MANUAL_EXEMPLARS = (("I loved it.", "positive"), ("It was awful.", "negative"))


class Given:
    """Score given prompts on each client's first ``n_texts`` texts, then weigh and calibrate them together."""

    name = "given"
    needs = frozenset({Capability.LABEL_CHOICE})
    card = Card(paper="", sends=frozenset({"ask", "newton"}), crosses="Sums of scores.")

    def __init__(self, prompts: Sequence[PromptTemplate], n_texts: int) -> None:
        self._prompts, self._n_texts = tuple(prompts), n_texts

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session = Session(federation)
        return (yield from session.calibrate(self._prompts, self._n_texts))


def zero_shot_prompt(federation: Federation) -> PromptTemplate:
    """The person's instruction and an empty form: what a first try without any tuning looks like."""
    fields = ("Text", "Label" if federation.labels else "Answer")
    return Draft(instruction=federation.instruction, fields=fields, exemplars=(), words=federation.words).template()


def manual_prompt(federation: Federation, given: str | None) -> PromptTemplate:
    """The hand-written few-shot prompt: ``given``, or the project's own for positive/negative sentiment."""
    if given is not None:  # as always in a task without labels
        return PromptTemplate(text=given, words=federation.words)
    index = {label: k for k, label in enumerate(federation.labels)}
    if set(index) != {"negative", "positive"}:
        raise ConfigError(
            "evaluation.baselines has manual_few_shot, but there is no hand-written prompt for the labels "
            f"{', '.join(federation.labels)}; give one in evaluation.manual_prompt or leave the baseline out"
        )
    return Draft(
        instruction=MANUAL_INSTRUCTION,
        fields=("Text", "Sentiment"),
        exemplars=tuple((text, index[label]) for text, label in MANUAL_EXEMPLARS),
        words=federation.words,
    ).template()
