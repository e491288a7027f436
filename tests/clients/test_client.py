"""A client behind `handle`: what it answers, what it spends, and that no text of its own ever leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.client import Client
from clients.data import ClientData, Labelled
from clients.domain_models.linear import PENALTY, LinearHead
from clients.learning import ANSWERING
from clients.scores import brier_score
from promptfed.federation.inprocess import InProcessTransport
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.ledger import Usage
from promptfed.messages import (
    Adopt,
    Adopted,
    Ask,
    Distil,
    Evaluate,
    Evaluated,
    Failed,
    Joined,
    Lessons,
    MomentSums,
    Newton,
    NewtonPart,
    Reply,
    Risk,
    Score,
    Scored,
    Stack,
    Task,
    TaskBody,
    Teach,
    Train,
    Trained,
    Unlearn,
    Vote,
    Votes,
    Weigh,
    Weighed,
    Write,
    Written,
    decode_reply,
    encode,
)
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, cross_fitted_proba, moments, sums
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.race import Race
from promptfed.types import Capability, FloatArray, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.support import JOIN, LABELS, CountingFM, FailingFM, WordEncoder, bench, client_data, parameters_of, wait_for

P = PromptTemplate(text="It seems wonderful.\nLabel: positive\n\nText: {text}\nLabel:", words=LABELS)
Q = PromptTemplate(text="It seems boring.\nLabel: negative\n\nText: {text}\nLabel:", words=LABELS)
PAIR = PromptSet(labels=LABELS, prompts=(P, Q), weights=(0.7, 0.3), bias=(0.1, -0.1))
SINGLE = PromptSet(labels=LABELS, prompts=(P,), weights=(1.0,), bias=(0.0, 0.0))
LESSONS = Lessons(texts=("It seems superb.", "A stale plot."), shares=bytes([10, 245, 200, 55]))
DISTIL = Distil(prompt=PAIR, stop=9, lessons=LESSONS, temperature=1.0, min_confidence=0.0)


def a_client(
    fm: BaseFM | None = None, data: ClientData | None = None, folder: Path | None = None
) -> tuple[Client, CountingFM]:
    counting = CountingFM(fm or ScriptedFM())
    client = Client(data or client_data("north", 20, 10), LABELS, counting, WordEncoder(), seed=1, folder=folder)
    return client, counting


def ask(client: Client, body: TaskBody, grant: int = 1000, client_id: str = "north", limit: int = 10_000) -> Reply:
    task = Task(round=4, client_id=client_id, run="run", fleet="tuning", grant=grant, limit=limit, body=body)
    return decode_reply(wait_for(client.handle(encode(task))))


def scored(client: Client, prompts: tuple[PromptTemplate, ...] = (P, Q), stop: int = 12) -> Client:
    ask(client, Ask(prompts=prompts, stop=stop))
    return client


# ---------------------------------------------------------------- what it answers


BOTH = (Capability.LABEL_LOGPROBS, Capability.TEXT)


def test_join_says_how_many_and_which_labels_occur() -> None:
    only_good = Labelled(texts=("one", "two"), labels=np.array([1, 1]))
    data = ClientData(client_id="north", train=only_good, test=client_data("x", 4, 6).test, n_dropped=3)

    reply = ask(a_client(data=data)[0], JOIN)

    assert reply == Reply(
        round=4,
        client_id="north",
        usage=Usage(),
        body=Joined(
            fm="scripted:overlap@0",
            encoder="words-64",
            capabilities=BOTH,
            n_train=2,
            n_test=6,
            labels=("positive",),
            n_dropped=3,
            domain_model="linear",
            is_priced=True,
        ),
    )


def test_write_and_weigh_pass_requests_to_the_model_and_book_them() -> None:
    client, fm = a_client()
    write = Write(requests=(TextRequest(prompt="p", max_tokens=5), TextRequest(prompt="q", max_tokens=5, seed=3)))
    weigh = Weigh(requests=(LabelRequest(prefix="", text="It is", suffix="", labels=(" a", " b")),))

    written, weighed = ask(client, write), ask(client, weigh)

    assert isinstance(written.body, Written)
    assert len(written.body.texts) == 2
    assert all(written.body.texts)
    assert isinstance(weighed.body, Weighed)
    assert np.exp(weighed.body.logprobs).sum() == pytest.approx(1.0, abs=1e-6)
    assert (written.usage.fm_calls, weighed.usage.fm_calls, fm.n_calls) == (2, 1, 3)


def test_items_that_the_model_refused_are_empty() -> None:
    client, _ = a_client(FailingFM())

    written = ask(client, Write(requests=(TextRequest(prompt="p", max_tokens=5),)))
    weighed = ask(client, Weigh(requests=(LabelRequest(prefix="", text="It", suffix="", labels=(" a", " b")),)))

    assert written.body == Written(texts=("",))
    assert weighed.body == Weighed(logprobs=((),), n_tokens=((),))


def test_votes_are_the_domain_models_probabilities_in_255ths() -> None:
    client, fm = a_client()

    reply = ask(client, Vote(texts=("It seems superb.", "It seems stale.", "")))

    assert isinstance(reply.body, Votes)
    shares = np.frombuffer(reply.body.shares, dtype=np.uint8).reshape(3, reply.body.n_labels)
    voter = client.domain.make().fit(client.data.train.texts, np.eye(2)[client.data.train.labels])
    expected = voter.predict_proba(["It seems superb.", "It seems stale.", ""])
    assert shares / 255 == pytest.approx(expected, abs=0.5 / 255 + 1e-12)
    assert shares[0, 1] > 128 > shares[1, 1]
    assert fm.n_calls == 0


def test_ask_scores_what_is_new_and_sends_moments() -> None:
    client, fm = a_client()

    first, second = ask(client, Ask(prompts=(P,), stop=5)), ask(client, Ask(prompts=(P, Q), stop=8))

    assert (first.usage.fm_calls, second.usage.fm_calls) == (5, 3 + 8)
    assert fm.n_calls == 16
    assert isinstance(second.body, MomentSums)
    scores, _, _ = client.scores.get((P, Q), 8)
    total, squares = moments(scores)
    assert second.body.n == 8
    assert second.body.total == pytest.approx(total.ravel(), abs=1e-4)
    assert second.body.squares == pytest.approx(squares.ravel(), rel=1e-6)


def test_ask_without_stop_makes_no_call_and_reads_what_all_prompts_share() -> None:
    client, fm = a_client()
    ask(client, Ask(prompts=(P,), stop=9))
    ask(client, Ask(prompts=(Q,), stop=4))

    reply = ask(client, Ask(prompts=(P, Q), stop=None), grant=0)

    assert isinstance(reply.body, MomentSums)
    assert reply.body.n == 4
    assert (reply.usage.fm_calls, fm.n_calls) == (0, 13)


def test_ask_beyond_the_last_text_stops_there() -> None:
    reply = ask(a_client()[0], Ask(prompts=(P,), stop=500))

    assert isinstance(reply.body, MomentSums)
    assert (reply.body.n, reply.usage.fm_calls) == (20, 20)


def score_task(*sets: tuple[int, ...], stop: int = 12) -> Score:
    return Score(prompts=(P, Q), sets=sets, stop=stop, weights=(1.0, 2.0), bias=(0.2, -0.2, 0.0, 0.4))


def mostly_cheerful() -> ClientData:
    """15 cheerful texts and 5 gloomy ones: with one more each, 6/22 and 16/22."""
    data = client_data("north", 30, 10)
    kept = np.concatenate([np.flatnonzero(data.train.labels == 1), np.flatnonzero(data.train.labels == 0)[:5]])
    order = np.random.default_rng(0).permutation(kept)
    train = Labelled(texts=tuple(data.train.texts[i] for i in order), labels=data.train.labels[order])
    return ClientData(client_id="north", train=train, test=data.test)


LEAN = 0.5 * np.log(16 / 6)  # towards label 1, from label 0


def test_score_sends_sums_of_scores_and_of_differences_to_the_first_set() -> None:
    client, fm = a_client(data=mostly_cheerful())
    scored(client)
    fm.requests.clear()

    reply = ask(client, score_task((0,), (1,), (0, 1)), grant=0)

    assert isinstance(reply.body, Scored)
    scores, labels, _ = client.scores.get((P, Q), 12)

    def by_hand(sources: list[int], weights: tuple[float, ...], bias: tuple[float, float]) -> FloatArray:
        start = Calibration(weights=weights, bias=(bias[0] - LEAN, bias[1] + LEAN))
        return brier_score(cross_fitted_proba(scores[:, sources], labels, towards=start), labels)

    expected = [
        by_hand([0], (1.0,), (0.2, -0.2)),
        by_hand([1], (2.0,), (0.0, 0.4)),
        by_hand([0, 1], (0.5, 1.0), (0.1, 0.1)),  # as a set: halved weights, mean of the biases
    ]
    assert reply.body.n == 12
    assert reply.body.total == pytest.approx([s.sum() for s in expected], rel=1e-5)
    assert reply.body.diff == pytest.approx([(s - expected[0]).sum() for s in expected], abs=1e-5)
    assert reply.body.diff_sq == pytest.approx([((s - expected[0]) ** 2).sum() for s in expected], abs=1e-5)
    assert fm.n_calls == 0


def test_score_asks_first_what_it_lacks_where_calls_are_granted() -> None:
    late, late_fm = a_client()
    there, _ = a_client()
    ask(there, Ask(prompts=(P, Q), stop=12))

    reply = ask(late, score_task((0,), (0, 1)), grant=24)

    assert reply.body == ask(there, score_task((0,), (0, 1))).body
    assert (reply.usage.fm_calls, late_fm.n_calls) == (24, 24)


def test_score_asks_nothing_where_what_was_granted_is_gone_and_says_what_it_has() -> None:
    client, fm = a_client()
    ask(client, Ask(prompts=(P, Q), stop=5))

    reply = ask(client, score_task((0,), (0, 1)), grant=24, limit=20)  # 10 of the 20 calls are made, 14 are wanted

    assert isinstance(reply.body, Scored)
    assert (reply.body.n, reply.usage.fm_calls, fm.n_calls) == (5, 0, 10)


def test_scores_are_bounded() -> None:
    client, _ = a_client()
    scored(client)

    reply = ask(client, score_task((0,), (1,)))

    assert isinstance(reply.body, Scored)
    assert all(0.0 <= total <= reply.body.n for total in reply.body.total)
    assert all(0.0 <= square <= reply.body.n for square in reply.body.diff_sq)


def test_newton_sends_the_sums_at_the_given_place_shifted_to_its_labels() -> None:
    client, _ = a_client(data=mostly_cheerful())
    scored(client)

    reply = ask(client, Newton(prompts=(P, Q), stop=8, weights=(1.0, 0.5), bias=(0.25, -0.25)), grant=0)

    assert isinstance(reply.body, NewtonPart)
    scores, labels, _ = client.scores.get((P, Q), 8)
    part = sums(scores, labels, Calibration(weights=(1.0, 0.5), bias=(0.25 - LEAN, -0.25 + LEAN)))
    assert reply.body.n == 8
    assert reply.body.loss == pytest.approx(part.loss, rel=1e-5)
    assert reply.body.gradient == pytest.approx(part.gradient, abs=1e-4)
    assert reply.body.sums.hessian == pytest.approx(part.hessian, rel=1e-3, abs=1e-3)


def test_newton_over_words_takes_each_word_as_a_source() -> None:
    client, _ = a_client(data=mostly_cheerful())
    wide = PromptTemplate(text=P.text, words=LABELS, synonyms=(("gloomy",), ()))
    scored(client, (wide,))
    at = {"weights": (0.5, 0.25, 1.0), "bias": (0.25, -0.25)}

    reply = ask(client, Newton(prompts=(wide,), stop=None, words=True, **at), grant=0)

    assert isinstance(reply.body, NewtonPart)
    sources, labels = client.scores.words(wide)
    part = sums(sources, labels, Calibration(weights=at["weights"], bias=(0.25 - LEAN, -0.25 + LEAN)))
    assert sources.shape == (12, 3, 2)
    assert reply.body.n == 12
    assert reply.body.gradient == pytest.approx(part.gradient, abs=1e-4)
    assert reply.body.sums.hessian == pytest.approx(part.hessian, rel=1e-3, abs=1e-3)


def test_training_goes_on_from_the_parameters_that_it_is_given() -> None:
    client, _ = a_client()

    first = ask(client, Train(parameters=()))
    assert isinstance(first.body, Trained)
    second = ask(client, Train(parameters=first.body.parameters))
    assert isinstance(second.body, Trained)

    assert first.body.n == second.body.n == 20
    assert len(first.body.parameters) == 2 * 64 + 2
    x, targets = WordEncoder().encode(client.data.train.texts), np.eye(2)[client.data.train.labels]

    def loss(flat: tuple[float, ...]) -> float:
        head = LinearHead(2, np.array(flat))
        return float(-(targets * np.log(head.predict_proba(x))).sum() + PENALTY / 2 * np.square(flat[:-2]).sum())

    assert loss(second.body.parameters) < loss(first.body.parameters) < 20 * np.log(2)


def test_adopt_keeps_calibration_stacker_and_head_at_home(tmp_path: Path) -> None:
    client, _ = a_client(folder=tmp_path)
    scored(client)

    reply = ask(client, Adopt(prompt=PAIR, stack=(1.0, 0.5)), grant=0)

    assert reply.body == Adopted(n_calibration=12)
    own = json.loads((tmp_path / "calibration.json").read_text())
    stacker = json.loads((tmp_path / "stacker.json").read_text())
    assert (len(own["weights"]), len(own["bias"])) == (2, 2)
    assert stacker["weights"] == [1.0, 0.5]
    assert len(stacker["domain_calibration"]["bias"]) == 2
    with np.load(tmp_path / "domain_model.npz") as kept:
        assert kept["state_parameters"] == pytest.approx(parameters_of(client))


def test_what_is_kept_names_the_prompt_by_the_id_that_it_is_published_under(tmp_path: Path) -> None:
    """Weights of a fit are 64-bit numbers: the trip over the wire must not make another prompt of them."""
    tuned = PromptSet(labels=LABELS, prompts=(P, Q), weights=(1 / 3, 0.1), bias=(0.7, -0.7))
    client, _ = a_client(folder=tmp_path)
    scored(client)

    ask(client, Adopt(prompt=tuned, stack=(1.0, 0.5)), grant=0)

    kept = json.loads((tmp_path / "calibration.json").read_text())
    assert kept["prompt_id"] == tuned.prompt_id


def test_evaluate_measures_on_held_out_texts_and_keeps_the_predictions(tmp_path: Path) -> None:
    client, fm = a_client(folder=tmp_path)
    scored(client)
    before = fm.n_calls

    reply = ask(client, Evaluate(arm="fm", prompt=PAIR))

    assert isinstance(reply.body, Evaluated)
    assert reply.body.n == 10
    assert reply.body.calls_per_prediction == 2.0
    assert reply.usage.fm_calls == fm.n_calls - before == 20
    kept = json.loads((tmp_path / "evaluation" / "fm.json").read_text())
    assert kept["labels"] == client.data.test.labels.tolist()
    assert kept["texts"][0] == hashlib.sha256(client.data.test.texts[0].encode()).hexdigest()[:16]
    right = np.argmax(kept["proba"], axis=1) == kept["labels"]
    assert reply.body.values["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert set(reply.body.values) == set(reply.body.errors) == {"accuracy", "macro_f1", "ece", "brier", "nll"}


def test_arms_that_share_prompts_share_calls() -> None:
    client, _ = a_client()
    scored(client)
    ask(client, Evaluate(arm="fm", prompt=PAIR))

    again = ask(client, Evaluate(arm="fm_pooled", prompt=PAIR), grant=0)

    assert isinstance(again.body, Evaluated)
    assert again.usage.fm_calls == 0


# ---------------------------------------------------------------- what it spends


def test_a_task_beyond_its_grant_makes_no_call() -> None:
    client, fm = a_client()

    reply = ask(client, Ask(prompts=(P,), stop=5), grant=4)

    assert reply.body == Failed(reason="BudgetError")
    assert (reply.usage.fm_calls, fm.n_calls) == (0, 0)


def test_what_one_grant_left_over_is_not_added_to_the_next() -> None:
    client, fm = a_client()
    ask(client, JOIN, grant=100)

    reply = ask(client, Ask(prompts=(P,), stop=5), grant=1)

    assert reply.body == Failed(reason="BudgetError")
    assert fm.n_calls == 0


class HalfWayFM(ScriptedFM):
    """Answers, with one label fewer than asked for: whoever reads the answer fails, after the calls were made."""

    async def complete(self, requests: Any) -> list[FMResponse]:
        return [FMResponse(logprobs=(0.0,), prompt_tokens=1) for _ in await super().complete(requests)][:-1]


def test_a_task_that_failed_reports_the_calls_that_it_made() -> None:
    client, fm = a_client(HalfWayFM())

    reply = ask(client, Ask(prompts=(P,), stop=6))

    assert isinstance(reply.body, Failed)
    assert fm.n_calls == 6
    assert reply.usage.fm_calls == 6


# ---------------------------------------------------------------- failures leave as a class name


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (Score(prompts=(P,), sets=((5,),), stop=3, weights=(1.0,), bias=(0.0, 0.0)), "IndexError"),
        (Evaluate(arm="no_such_arm", prompt=PAIR), "UnknownNameError"),
        (Evaluate(arm="fm"), "RunError"),
        (Evaluate(arm="../../escape", prompt=PAIR), "WireError"),
        (Evaluate(arm="fm@/../../../index/released", prompt=PAIR), "WireError"),
    ],
)
def test_a_task_that_cannot_be_done_is_a_failed_reply(body: TaskBody, reason: str, tmp_path: Path) -> None:
    client, _ = a_client(folder=tmp_path)

    assert ask(client, body).body == Failed(reason=reason)
    assert list(tmp_path.iterdir()) == []


def test_a_task_for_another_client_is_refused() -> None:
    reply = ask(a_client()[0], JOIN, client_id="south")

    assert reply.body == Failed(reason="WireError")
    assert reply.client_id == "north"


@pytest.mark.parametrize(
    "data",
    [b"", b"rubbish", b"\x80", encode(Reply(round=1, client_id="north", usage=Usage(), body=Failed(reason="x")))],
)
def test_what_is_not_a_task_is_answered_too(data: bytes) -> None:
    reply = decode_reply(wait_for(a_client()[0].handle(data)))

    assert reply.body == Failed(reason="WireError")


def test_text_that_no_encoding_can_carry_does_not_break_the_client() -> None:
    """A model behind JSON may write a lone surrogate; ``handle`` never raises for it."""
    client, _ = a_client(ScriptedFM(phrases=("half a pair: \ud83d",)))

    reply = ask(client, Write(requests=(TextRequest(prompt="p", max_tokens=5),)))

    assert isinstance(reply.body, Written | Failed)


# ---------------------------------------------------------------- no text leaves

CANARY = "quxcanary"


class TellTaleFM(BaseFM):
    """Fails with the text of the request in its message: a class or two of real clients do."""

    fm_id = "telltale@0"
    capabilities = ScriptedFM().capabilities

    async def complete(self, requests: Any) -> list[FMResponse]:
        request: FMRequest = requests[0]
        quoted = request.text if isinstance(request, LabelRequest) else request.prompt
        raise ValueError(f"could not answer {quoted!r}")


def marked(n: int, seed: int) -> Labelled:
    plain = client_data("x", n, 1, seed).train
    return Labelled(
        texts=tuple(f"{t} {CANARY}{i} {CANARY.upper()}" for i, t in enumerate(plain.texts)), labels=plain.labels
    )


def marked_data(client_id: str = "north") -> ClientData:
    return ClientData(client_id=client_id, train=marked(20, 1), test=marked(10, 2), unlabelled=marked(9, 3).texts)


EVERY_TASK: dict[str, TaskBody] = {
    "join": JOIN,
    "write": Write(requests=(TextRequest(prompt="Very short texts:\n-", max_tokens=8),)),
    "weigh": Weigh(requests=(LabelRequest(prefix="", text="It was", suffix="", labels=(" a", " b")),)),
    "vote": Vote(texts=("It seems superb.", "A stale plot.")),
    "ask": Ask(prompts=(P, Q), stop=12),
    "score": score_task((0,), (0, 1)),
    "score what was missed": score_task((0,), (0, 1), stop=15),
    "newton": Newton(prompts=(P, Q), stop=None, weights=(1.0, 1.0), bias=(0.0, 0.0)),
    "adopt": Adopt(prompt=PAIR, stack=(1.0, 0.5)),
    "train": Train(parameters=()),
    "teach": Teach(prompt=PAIR, texts=("It seems superb.", "A stale plot.")),
    "distil": DISTIL,
    "unlearn": Unlearn(),
    "lessons of other labels": replace(DISTIL, lessons=replace(LESSONS, shares=b"abc")),
    "risk": Risk(single=SINGLE, stack=(1.0, 0.5), thresholds=(0.9,), tried=(0.6, 0.9)),
    "stack": Stack(prompt=PAIR, weights=(1.0, 0.5)),
    **{
        f"evaluate {arm}": Evaluate(arm=arm, prompt=PAIR, stack=(1.0, 0.5))
        for arm in ("fm", "fm_pooled", "fm_dm", "dm_local")
    },
    "unknown arm": Evaluate(arm="nope", prompt=PAIR),
    "bad set": Score(prompts=(P,), sets=((9,),), stop=3, weights=(1.0,), bias=(0.0, 0.0)),
    "bad head": Evaluate(arm="dm_fedavg", parameters=(1.0,)),
}


def assert_silent(data: bytes | str) -> None:
    raw = data.encode() if isinstance(data, str) else data
    assert CANARY.encode() not in raw.lower()


@pytest.mark.parametrize("fm", [ScriptedFM(), TellTaleFM(), FailingFM()], ids=["answers", "tells tales", "refuses"])
def test_no_reply_to_any_task_carries_a_text(
    fm: BaseFM, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    client, counting = a_client(fm, marked_data(), folder=tmp_path)
    scored(client)

    for name, body in EVERY_TASK.items():
        task = Task(round=1, client_id="north", run="run", fleet="tuning", grant=500, limit=10_000, body=body)
        data = wait_for(client.handle(encode(task)))
        assert_silent(data)
        if name in ("unknown arm", "bad set", "bad head"):
            assert isinstance(decode_reply(data).body, Failed), name

    # The texts were read and put to the model: silence is not for want of a voice.
    assert any(CANARY in r.text for r in counting.requests if isinstance(r, LabelRequest))
    out = capfd.readouterr()
    assert_silent(out.out + out.err + caplog.text)


def test_every_kind_of_task_is_in_the_list() -> None:
    from typing import get_args

    from promptfed.messages import TaskBody as AllBodies
    from promptfed.messages.methods import TaskBody as OfMethods
    from promptfed.messages.retrieval import TaskBody as OfIndices

    of_others = {*get_args(OfMethods), *get_args(OfIndices)}
    assert {type(body) for body in EVERY_TASK.values()} == set(get_args(AllBodies)) - of_others


def test_every_task_of_a_method_is_done_by_somebody() -> None:
    """That no text leaves with it is in the contract of the method that sends it (tests/contracts/method.py)."""
    from typing import get_args

    from clients.tasks import METHOD_TASKS
    from promptfed.messages.methods import TaskBody as OfMethods

    assert set(METHOD_TASKS) == set(get_args(OfMethods))


class Tap:
    """A transport that keeps everything that went over the wire, both ways."""

    def __init__(self, inner: InProcessTransport) -> None:
        self._inner = inner
        self.wire: list[bytes] = []

    async def exchange(self, tasks: Mapping[str, bytes], *rules: Any) -> dict[str, bytes]:
        replies = await self._inner.exchange(tasks, *rules)
        self.wire += [*tasks.values(), *replies.values()]
        return replies


def test_a_whole_run_carries_no_text_on_the_wire_in_events_or_in_the_prompt(
    capfd: pytest.CaptureFixture[str],
) -> None:
    taps: list[Tap] = []

    def tapped(inner: InProcessTransport) -> Tap:
        inner._clients["client1"] = Client(marked_data("client1"), LABELS, fm, WordEncoder(), seed=1)
        taps.append(Tap(inner))
        return taps[-1]

    fm = CountingFM(ScriptedFM())
    scene = bench(2, 20, wrap=tapped)
    prompt = scene.drive(Race().run(scene.federation(max_fm_calls=400)), 400)

    assert len(taps[0].wire) > 20
    for data in taps[0].wire:
        assert_silent(data)
    assert_silent(json.dumps(scene.events.events))
    assert_silent(repr(prompt))
    assert any(CANARY in r.text for r in fm.requests if isinstance(r, LabelRequest))
    out = capfd.readouterr()
    assert_silent(out.out + out.err)


def test_printing_data_shows_no_text() -> None:
    assert_silent(repr(marked_data()))
    assert_silent(str(marked_data()))


def test_the_domain_model_is_fitted_once_on_all_training_texts() -> None:
    client, _ = a_client()

    assert client.domain.model is client.domain.model
    by_hand = client.domain.make().fit(client.data.train.texts, ANSWERING * np.eye(2)[client.data.train.labels])
    held_out = ["It seems superb.", "It seems stale."]
    assert client.domain.model.predict_proba(held_out) == pytest.approx(by_hand.predict_proba(held_out))
