"""``fed_icl``: the contract, fusing by hand, and the planted optimum through the whole federation."""

from __future__ import annotations

import pytest

from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.fed_icl import FedICL
from tests.contracts.method import MethodContract
from tests.support import LABELS, bench, pooled_accuracy, public_texts


class TestContract(MethodContract):
    def method(self) -> FedICL:
        return FedICL(texts_per_heat=6)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_planted_prompt_is_found(seed: int) -> None:
    scene = bench(3, 30, n_words=2)
    federation = scene.federation(max_fm_calls=900, seed=seed, public=public_texts(n_words=2))

    prompt = scene.drive(FedICL().run(federation), 900)

    first = PromptSet(
        labels=LABELS,
        prompts=(PromptTemplate(text="Is the review negative or positive?\n\nText: {text}\nLabel:", words=LABELS),),
        weights=(1.0,),
        bias=(0.0, 0.0),
    )
    assert pooled_accuracy(first, 100, seed=77) < 0.6
    assert pooled_accuracy(prompt, 100, seed=77) > 0.85
