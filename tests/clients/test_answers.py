"""The store of answers: paid for once, votes of sets, and a refused text is worth nothing."""

from __future__ import annotations

import numpy as np
import pytest

from clients.answers import AnswerStore
from clients.client import Client
from clients.data import Labelled, assemble
from promptfed.errors import DataError
from promptfed.fm.base import BaseFM
from promptfed.messages import Adopt, Evaluate, Join, Joined, MomentSums, Score, Scored, Task, decode_reply, encode
from promptfed.messages.core import Adopted, Ask, Evaluated
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FMRequest, FMResponse, TextRequest
from tests.answering import AnsweringFM, answer_data
from tests.support import CountingFM, WordEncoder, wait_for

A, B, C = (PromptTemplate(text=f"{name}: {{text}}", words=()) for name in "ABC")
DATA = Labelled(texts=("one", "two", "three"), labels=np.zeros(0, dtype=np.int64), answers=("red lamp", "blue", "grey"))
SAID = {
    "A: one": "red lamp",
    "B: one": "lamp",
    "C: one": "Lamp.",
    "A: two": "blue",
    "B: two": "green",
    "C: two": "white",
    "A: three": None,
    "B: three": None,
    "C: three": "grey",
}


class SayingFM(BaseFM):
    """Says what `SAID` has for a prompt; None is a failure."""

    fm_id = "saying@0"
    capabilities = frozenset({Capability.TEXT})

    async def complete(self, requests: object) -> list[FMResponse]:
        said = [SAID[r.prompt] for r in requests if isinstance(r, TextRequest)]  # type: ignore[attr-defined]
        return [FMResponse(error="refused") if text is None else FMResponse(text=text) for text in said]


def scored(store: AnswerStore, *prompts: PromptTemplate, beside: tuple[PromptTemplate, ...] = ()) -> list[float]:
    alike = Calibration(weights=(1.0 / len(prompts),) * len(prompts), bias=())
    return store.proper_scores(prompts, 3, alike, beside).tolist()


def test_nothing_is_asked_twice() -> None:
    store, fm = AnswerStore(DATA), CountingFM(SayingFM())

    calls = [wait_for(store.ask(fm, prompts, stop)) for prompts, stop in [((A,), 2), ((A, A, B), 3), ((B,), 99)]]

    assert calls == [2, 1 + 3, 0]
    assert fm.n_calls == 6


def test_a_set_has_the_f1_of_what_most_of_it_say() -> None:
    store = AnswerStore(DATA)
    wait_for(store.ask(SayingFM(), (A, B, C), 3))

    assert scored(store, A) == pytest.approx([1.0, 1.0, 0.0])
    assert scored(store, B) == pytest.approx([2 / 3, 0.0, 0.0])
    # "lamp" twice against "red lamp"; all different, so the first; and who failed has no say.
    assert scored(store, A, B, C) == pytest.approx([2 / 3, 1.0, 1.0])


def test_only_texts_that_all_were_asked_about_count() -> None:
    store = AnswerStore(DATA)
    wait_for(store.ask(SayingFM(), (A,), 3))
    wait_for(store.ask(SayingFM(), (B,), 1))

    assert scored(store, A, beside=(B,)) == [1.0]
    assert scored(store, C) == []
    assert store.get((A, B))[0].shape == (1, 2, 0)
    assert store.get((A,), 2)[2].tolist() == [0, 1]


def test_what_another_store_paid_for_is_adopted_by_row() -> None:
    whole, part = AnswerStore(DATA), AnswerStore(Labelled(texts=("two",), labels=DATA.labels, answers=("blue",)))
    wait_for(whole.ask(SayingFM(), (A,), 2))

    part.adopt(whole, np.array([1]))

    assert part.proper_scores((A,), 1, Calibration(weights=(1.0,), bias=())).tolist() == [1.0]
    assert wait_for(part.ask(SayingFM(), (A,), 1)) == 0


# ---------------------------------------------------------------- data and client


def test_without_labels_rows_carry_answers_in_an_order_of_the_seeds() -> None:
    train = [("a", f"text {i}", f"answer {i}") for i in range(9)] + [("a", " ", "lost")]

    (first,), (again,), (other,) = (assemble(train, [("a", "new", "never seen")], (), seed) for seed in (1, 1, 2))

    assert first.train.texts == again.train.texts
    assert first.train.texts != other.train.texts
    assert [t.split()[1] for t in first.train.texts] == [a.split()[1] for a in first.train.answers]
    assert (len(first.train), first.train.labels.size, first.n_dropped) == (9, 0, 1)
    assert first.test.answers == ("never seen",)
    with pytest.raises(DataError, match="test has labels"):
        assemble(train, [("a", "new", "never seen")], tuple(sorted({y for *_, y in train})), 1)


def handle(client: Client, body: object, grant: int = 0, number: int = 1) -> object:
    task = Task(
        round=number,
        client_id=client.client_id,
        grant=grant,
        limit=10**6,
        body=body,  # type: ignore[arg-type]
        run="r",
        fleet="tuning",
    )
    return decode_reply(wait_for(client.handle(encode(task)))).body


def test_a_client_of_a_generation_task_has_no_labels_to_tell_of(tmp_path: object) -> None:
    client = Client(answer_data("a", 6, 4), (), AnsweringFM(), WordEncoder(), seed=1, folder=tmp_path)  # type: ignore[arg-type]
    prompt = PromptTemplate(text="Q\n\nText: {text}\nAnswer:", words=())
    tuned = PromptSet(labels=(), prompts=(prompt,), weights=(1.0,), bias=())

    joined = handle(client, Join(labels=(), seed=1))
    asked = handle(client, Ask(prompts=(prompt,), stop=6), grant=6, number=2)
    told = handle(client, Score(prompts=(prompt,), sets=((0,),), stop=6, weights=(1.0,), bias=()), number=3)
    adopted = handle(client, Adopt(prompt=tuned, stack=(1.0, 0.0)), number=4)
    measured = handle(client, Evaluate(arm="fm", prompt=tuned), grant=4, number=5)

    assert isinstance(joined, Joined)
    assert (joined.labels, joined.n_train, joined.n_test) == ((), 6, 4)
    assert asked == MomentSums(n=6, total=(), squares=(0.0,))
    assert isinstance(told, Scored)
    assert (told.n, told.diff, told.diff_sq) == (6, (0.0,), (0.0,))
    assert 0 < told.total[0] <= 6
    assert adopted == Adopted(n_calibration=0)
    assert isinstance(measured, Evaluated)
    assert set(measured.values) == {"token_f1", "exact_match"}
    assert measured.calls_per_prediction == 1.0
    kept = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json"))  # type: ignore[attr-defined,arg-type]
    assert kept == ["evaluation/fm.json", "prompt.json"]
    assert "lamp" not in (tmp_path / "evaluation" / "fm.json").read_text()  # type: ignore[operator]


def test_requests_of_prompts_that_generate_are_text_requests() -> None:
    requests: list[FMRequest] = A.requests(["one"])

    assert [type(r) for r in requests] == [TextRequest]
