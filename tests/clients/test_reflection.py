"""Reflection at a client: its calls, what is taken and given up, what the FM is shown; and wins by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clients.client import Client
from clients.data import Labelled
from clients.reflection import reflect, shared_wins, wins
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Ask, Task
from promptfed.messages.methods import Reflect, Reflected, Wins
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.answering import answer_data
from tests.support import LABELS, CountingFM, FailingFM, WordEncoder, client_data, wait_for
from tests.writing import ADVICE, TellTale, advised_rule, advising

START = "Is it good?"
TEMPLATE = PromptTemplate(text=f"{START}\n\nText: {{text}}\nLabel:", words=LABELS)


def a_client(fm: BaseFM, n_train: int = 20) -> tuple[Client, CountingFM]:
    counting = CountingFM(fm)
    client = Client(client_data("a", n_train), LABELS, counting, WordEncoder(), seed=1)
    client.fm.grant = 1000
    return client, counting


def a_task(**changes: Any) -> Reflect:
    values: dict[str, Any] = {
        "template": TEMPLATE,
        "instruction": START,
        "weight": 1.0,
        "bias": (0.0, 0.0),
        "known": ("adjective",),
        "start": 0,
        "n_examples": 8,
        "n_steps": 1,
        "max_tokens": 50,
        "max_words": 40,
        "seed": 3,
        **changes,
    }
    return Reflect(**values)


def asked(counting: CountingFM) -> tuple[list[TextRequest], list[LabelRequest]]:
    requests = counting.requests
    return [r for r in requests if isinstance(r, TextRequest)], [r for r in requests if isinstance(r, LabelRequest)]


def score_first(client: Client, counting: CountingFM, stop: int) -> None:
    wait_for(client._do(replace(a_message(), body=Ask(prompts=(TEMPLATE,), stop=stop))))
    counting.requests.clear()


def a_message() -> Task:
    return Task(round=1, client_id="a", run="r", fleet="f", grant=0, limit=0, body=Ask(prompts=(), stop=None))


# ---------------------------------------------------------------- reflection


def test_good_advice_is_taken_within_the_calls_that_are_granted() -> None:
    client, counting = a_client(advising([ADVICE]))

    done = wait_for(reflect(client, a_task()))

    assert done == Reflected(instruction=ADVICE, n_stopped=0)
    texts, labels = asked(counting)
    assert len(texts) == 2  # a critique and a rewrite
    assert len(labels) == 8 + 8
    assert counting.n_calls == Reflect.most_fm_calls(8, 1) == 18


@pytest.mark.parametrize("n_steps", [1, 3])
def test_bad_advice_is_given_up_step_by_step(n_steps: int) -> None:
    def rule(request: LabelRequest) -> Sequence[float]:
        gloomy, cheerful = advised_rule(request)
        return [gloomy, cheerful] if START in request.prefix else [cheerful, gloomy]

    client, counting = a_client(ScriptedFM(rule=rule, phrases=["Turn it all round."]))

    done = wait_for(reflect(client, a_task(n_steps=n_steps)))

    assert done.instruction == ""
    assert counting.n_calls <= Reflect.most_fm_calls(8, n_steps)


def test_the_first_step_to_be_better_is_where_the_next_one_begins() -> None:
    client, counting = a_client(advising(["Read it well. " + ADVICE, ADVICE]))

    done = wait_for(reflect(client, a_task(n_steps=4, n_examples=20)))

    assert ADVICE in done.instruction
    critiques = [r.prompt for r in asked(counting)[0][::2]]
    assert f"Its instruction is: {START}\n" in critiques[0]
    assert all(f"Its instruction is: {done.instruction}\n" in c for c in critiques[2:])


def test_mistakes_are_shown_with_the_right_and_the_given_word_and_nothing_else_is() -> None:
    client, counting = a_client(advising([ADVICE]))

    wait_for(reflect(client, a_task()))

    (critique, rewrite), labels = asked(counting)
    data = client.data.train
    shown = [i for i, text in enumerate(data.texts) if text in critique.prompt]
    assert 1 <= len(shown) <= 4
    batch = {r.text.strip() for r in labels}
    assert all(data.texts[i] in batch for i in shown)
    for i in shown:
        right, wrong = LABELS[data.labels[i]], LABELS[1 - data.labels[i]]
        assert f"Text: {data.texts[i]}\nRight answer: {right}\nAnswer given: {wrong}" in critique.prompt
    assert not [text for text in data.texts if text in rewrite.prompt]


def test_known_answers_are_not_asked_for_again_and_half_of_the_texts_are_mistakes() -> None:
    client, counting = a_client(advising([ADVICE]), n_train=60)
    score_first(client, counting, 60)

    wait_for(reflect(client, a_task(n_examples=6)))

    texts, labels = asked(counting)
    assert len(texts) == 2
    assert len(labels) == 6  # with the rewrite only
    assert texts[0].prompt.count("Right answer:") == 3


def test_texts_before_the_start_are_not_read() -> None:
    client, counting = a_client(advising([ADVICE]))

    wait_for(reflect(client, a_task(start=12)))

    assert {r.text.strip() for r in asked(counting)[1]} == set(client.data.train.texts[12:])


def test_a_client_with_too_few_texts_beyond_the_start_draws_from_all() -> None:
    client, counting = a_client(advising([ADVICE]), n_train=6)

    wait_for(reflect(client, a_task(start=5)))

    assert len(asked(counting)[1]) == 6 + 6


def test_where_nothing_went_wrong_nothing_is_written() -> None:
    best = PromptTemplate(text=f"{ADVICE}\n\nText: {{text}}\nLabel:", words=LABELS)
    client, counting = a_client(ScriptedFM(rule=advised_rule))

    done = wait_for(reflect(client, a_task(template=best, instruction=ADVICE)))

    assert done == Reflected(instruction="", n_stopped=0)
    assert counting.n_calls == 8


def test_the_gate_counts_what_it_stops_and_no_prompt_of_it_is_tried() -> None:
    client, counting = a_client(TellTale(lambda text: f"Consider {text}"))

    done = wait_for(reflect(client, a_task(n_steps=2)))

    assert done == Reflected(instruction="", n_stopped=2)
    assert len(asked(counting)[1]) == 8


@pytest.mark.parametrize("known", [(), ("a whole sentence of known words",), ("x",) * 300])
def test_a_server_can_not_open_the_gate_with_a_dictionary(known: tuple[str, ...]) -> None:
    client, _ = a_client(TellTale(lambda text: f"Consider {text}"))
    texts = client.data.train.texts

    told = (*known, *texts, *(word for text in texts for word in text.split())) if len(known) == 300 else texts
    done = wait_for(reflect(client, a_task(known=told)))

    assert done == Reflected(instruction="", n_stopped=1)


def test_a_model_that_fails_brings_nothing() -> None:
    client, _ = a_client(FailingFM())

    assert wait_for(reflect(client, a_task())).instruction == ""


def test_a_prompt_that_does_not_begin_with_its_instruction_is_an_error() -> None:
    client, _ = a_client(advising([ADVICE]))

    with pytest.raises(ValueError, match="begin"):
        wait_for(reflect(client, a_task(instruction="Another one")))


def test_it_leaves_nothing_behind() -> None:
    client, counting = a_client(advising([ADVICE]))

    first, again = (wait_for(reflect(client, a_task())) for _ in range(2))

    assert first == again
    assert counting.n_calls == 2 * 18  # nothing was remembered
    assert len(client.scores.get([TEMPLATE])[0]) == 0


# ---------------------------------------------------------------- wins


def test_wins_by_hand() -> None:
    scores = np.array([[0.9, 0.5, 0.2, 0.0], [0.1, 0.5, 0.4, 0.0], [0.2, 0.1, 0.4, 0.0]])

    #                text 1, then a tie of two, a tie of the others, a tie of all three
    assert shared_wins(scores) == pytest.approx([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3])
    assert shared_wins(np.zeros((2, 0))).tolist() == [0.0, 0.0]


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(0, 6)), elements=st.floats(0, 1)))
def test_there_are_as_many_wins_as_texts(scores: Any) -> None:
    won = shared_wins(scores)

    assert won.sum() == pytest.approx(scores.shape[1])
    assert (won >= 0).all()


def test_wins_are_over_texts_that_all_prompts_were_scored_on_and_cost_nothing() -> None:
    good = PromptTemplate(text=f"{ADVICE}\n\nText: {{text}}\nLabel:", words=LABELS)
    client, counting = a_client(advising())
    for template, stop in ((TEMPLATE, 20), (good, 12)):
        wait_for(client._do(replace(a_message(), body=Ask(prompts=(template,), stop=stop))))
    counting.requests.clear()

    won = wait_for(wins(client, Wins(prompts=(TEMPLATE, good), stop=16, weights=(1.0, 1.0), bias=(0.0, 0.0, 0.0, 0.0))))

    assert won.n == 12
    assert sum(won.shares) == pytest.approx(12)
    assert won.shares[1] > won.shares[0]
    assert counting.n_calls == 0


# ---------------------------------------------------------------- where answers are written

ASK = PromptTemplate(text=f"{START}\n\nText: {{text}}\nAnswer:", words=())


class QuotingFM(BaseFM):
    """Writes ``instruction`` whatever it is shown; if it ``helps``, answers rightly where a prompt begins with it."""

    fm_id = "quoting@0"
    capabilities = frozenset({Capability.TEXT})

    def __init__(self, data: Labelled, instruction: str, helps: bool) -> None:
        self._right = dict(zip(data.texts, data.answers, strict=True))
        self._instruction, self._helps = instruction, helps

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return [FMResponse(text=self._write(r.prompt)) for r in requests if isinstance(r, TextRequest)]

    def _write(self, prompt: str) -> str:
        if "nstruction" in prompt:
            return self._instruction
        right = self._right[prompt.rsplit("Text: ", 1)[1].removesuffix("\nAnswer:")]
        return right if self._helps and prompt.startswith(self._instruction) else f"{right} or not"


def an_answering_client(
    instruction: str, n_train: int = 20, *, answer: str = "", helps: bool = True
) -> tuple[Client, CountingFM]:
    """A client of a generation task; with ``answer``, all its right answers are this one, which no text has."""
    data = answer_data("a", n_train)
    if answer:
        data = replace(data, train=replace(data.train, answers=(answer,) * n_train))
    counting = CountingFM(QuotingFM(data.train, instruction, helps))
    client = Client(data, (), counting, WordEncoder(), seed=1)
    client.fm.grant = 1000
    return client, counting


def ask_for(**changes: Any) -> Reflect:
    return a_task(**{"template": ASK, "bias": (), **changes})


def test_a_better_token_f1_is_taken_and_the_fm_is_shown_right_and_given_answers() -> None:
    client, counting = an_answering_client("Be brief about it.")

    done = wait_for(reflect(client, ask_for()))

    assert done == Reflected(instruction="Be brief about it.", n_stopped=0)
    assert counting.n_calls == Reflect.most_fm_calls(8, 1)
    critique, rewrite = (r.prompt for r in counting.requests[8:10] if isinstance(r, TextRequest))
    train = client.data.train
    shown = [i for i, text in enumerate(train.texts) if text in critique]
    assert len(shown) == 4
    for i in shown:
        right = train.answers[i]
        assert f"Text: {train.texts[i]}\nRight answer: {right}\nAnswer given: {right} or not" in critique
    assert not [text for text in train.texts if text in rewrite]


def test_an_equal_token_f1_is_not_better() -> None:
    client, counting = an_answering_client("Be brief about it.", helps=False)

    done = wait_for(reflect(client, ask_for()))

    assert done == Reflected(instruction="", n_stopped=0)
    assert counting.n_calls == Reflect.most_fm_calls(8, 1)  # it was tried


def test_where_all_is_answered_rightly_nothing_is_written() -> None:
    client, counting = an_answering_client("Be brief about it.")
    brief = replace(ASK, text=ASK.text.replace(START, "Be brief about it."))

    done = wait_for(reflect(client, ask_for(template=brief, instruction="Be brief about it.")))

    assert done == Reflected(instruction="", n_stopped=0)
    assert counting.n_calls == 8


@pytest.mark.parametrize("answer", ["Zanzibar", "the other side"])
@pytest.mark.parametrize("tell", ["Always answer with {}.", "Look at {} with care.", "Say that it is {}."])
def test_a_private_answer_does_not_pass_the_gate(answer: str, tell: str) -> None:
    client, counting = an_answering_client(tell.format(answer), answer=answer)
    harmless, _ = an_answering_client(tell.format("that"), answer=answer)

    done = wait_for(reflect(client, ask_for(n_steps=2)))

    assert done == Reflected(instruction="", n_stopped=2)
    assert counting.n_calls == 8 + 2 * 2  # what was stopped is not tried
    assert wait_for(reflect(harmless, ask_for())) == Reflected(instruction=tell.format("that"), n_stopped=0)


def test_known_answers_are_not_asked_for_again() -> None:
    client, counting = an_answering_client("Be brief about it.")
    wait_for(client._do(replace(a_message(), body=Ask(prompts=(ASK,), stop=20))))
    counting.requests.clear()

    done = wait_for(reflect(client, ask_for(n_examples=6)))

    assert done.instruction == "Be brief about it."
    assert counting.n_calls == 2 + 6  # with the rewrite only
    assert len(client.scores.get([ASK])[2]) == 20


def test_a_model_that_gives_no_answer_is_shown_none() -> None:
    client = Client(answer_data("a"), (), FailingFM(), WordEncoder(), seed=1)
    client.fm.grant = 1000

    pooled = Calibration(weights=(1.0,), bias=())
    marks = client.scores.mark(ASK, np.array([None, "red lamp"], dtype=object), np.array([0, 1]), pooled)

    assert marks.given == ["(none)", "red lamp"]
    assert marks.right == list(client.data.train.answers[:2])
    assert marks.wrong[0]
    assert wait_for(reflect(client, ask_for())).instruction == ""


def test_wins_are_by_token_f1() -> None:
    client, counting = an_answering_client("Be brief about it.", n_train=6)
    other, brief = (replace(ASK, text=ASK.text.replace(START, text)) for text in ("Go on.", "Be brief about it."))
    wait_for(client._do(replace(a_message(), body=Ask(prompts=(ASK, other, brief), stop=6))))
    counting.requests.clear()

    won, tied = (
        wait_for(wins(client, Wins(prompts=prompts, stop=6, weights=(1.0, 1.0), bias=())))
        for prompts in ((ASK, brief), (ASK, other))
    )

    assert (won.n, won.shares) == (6, (0.0, 6.0))
    assert tied.shares == (3.0, 3.0)
    assert counting.n_calls == 0
