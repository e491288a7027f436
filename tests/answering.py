"""A made-up generation task, and a foundation model without weights that does it better when it is shown how.

Texts are "Ada keeps the red lamp in Ghent. What does Ada keep?", with the answer "red lamp". The model answers in a
sentence, but for every fourth text; with exemplars that show the thing alone it does so too, the more of them the more
often. So the best prompt has as many exemplars as there may be, and the first draft has none. Another model does so
when it is told how.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from clients.data import ClientData, Labelled
from evaluators.answers import per_text
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import content_hash
from promptfed.types import Capability, FMRequest, FMResponse, TextRequest
from tests.contracts.method import MethodContract

COLOURS = ("red", "blue", "green", "white", "black", "grey")
THINGS = ("lamp", "chair", "clock", "piano", "tent", "drill")
PEOPLE = ("Ada", "Boris", "Clara", "Daniel", "Elena", "Felix")
CITIES = ("Ghent", "Porto", "Riga", "Turin", "York", "Graz")
# What an instruction has to say to be a good one to `AdvisedFM`, and what that may write.
ADVICE = "Give the thing alone."
PHRASES = ("Try to be good at it.", f"Read it all. {ADVICE}", "Say what it is about.", ADVICE)


def questions(n: int, seed: int = 0) -> Labelled:
    """``n`` texts with their answers."""
    rng = np.random.default_rng([seed, 9])
    texts, answers = [], []
    for i in range(n):
        person, colour, thing, city = (str(rng.choice(words)) for words in (PEOPLE, COLOURS, THINGS, CITIES))
        texts.append(f"{person} keeps the {colour} {thing} in {city}, shelf {seed}{i}. What does {person} keep?")
        answers.append(f"{colour} {thing}")
    return Labelled(texts=tuple(texts), labels=np.zeros(0, dtype=np.int64), answers=tuple(answers))


def answer_data(client_id: str, n_train: int = 20, n_test: int = 10, seed: int = 0, **_: int) -> ClientData:
    """One client's texts and answers."""
    return ClientData(client_id=client_id, train=questions(n_train, seed), test=questions(n_test, seed + 1000))


def public_questions(n: int = 24) -> tuple[str, ...]:
    """Texts of the same kind that everybody may read, without answers."""
    return questions(n, 500).texts


def fresh_f1(prompt: PromptSet, fm: BaseFM) -> float:
    """Mean token F1 of ``prompt`` on two hundred texts that no client has."""
    fresh = questions(200, 777)
    said = [p.answer for p in prompt.predict(fresh.texts, fm=fm)]
    return float(per_text(said, fresh.answers)["token_f1"].mean())


# What `tests.support.bench` is told of this task.
TASK = {"labels": (), "data": answer_data, "public": public_questions(), "instruction": "Answer the question."}


class AnswersContract(MethodContract):
    """What every method that generates has to keep."""

    task = TASK
    test_it_works_for_six_labels_that_clients_hold_unevenly = None  # there are none here


class AnsweringFM(ScriptedFM):
    """Writes only, by the rule that the module docstring tells; of instructions, it writes ``phrases``."""

    def __init__(self, phrases: Sequence[str] = PHRASES) -> None:
        super().__init__("answering", phrases=phrases, capabilities=frozenset({Capability.TEXT}))

    def _answer(self, request: FMRequest) -> FMResponse:
        assert isinstance(request, TextRequest)
        if re.search(r"instruction[^\n]*:$", request.prompt):
            return super()._answer(request)
        *shown, asked = request.prompt.split("\n\n")
        found = re.search(r"keeps the (\w+ \w+) in", asked)
        draw = int(content_hash([request.prompt], 8), 16) / 16**8
        thing = found[1] if found else "nothing"
        alone = draw < self._chance(shown)
        return FMResponse(
            text=f" {thing}" if alone else f" I believe that it is the {thing}, as the text says quite clearly.",
            prompt_tokens=len(request.prompt.split()),
            completion_tokens=3,
        )

    def _chance(self, shown: Sequence[str]) -> float:
        """Of answering with the thing alone."""
        return 0.25 + 0.18 * sum(bool(re.search(r": \w+ \w+$", block)) for block in shown)


class AdvisedFM(AnsweringFM):
    """Does it nearly always where the instruction has the `ADVICE`, whatever is shown."""

    def _chance(self, shown: Sequence[str]) -> float:
        return 0.95 if ADVICE.rstrip(".") in "".join(shown[:1]) else 0.25
