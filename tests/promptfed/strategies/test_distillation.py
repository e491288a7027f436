"""The FM teaches the domain models: what is asked of whom, for how many calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from clients.data import ClientData
from promptfed.errors import RunError
from promptfed.messages import Distil, Distilled, Failed, Reply, ReplyBody, Teach, Votes
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Federation, Round
from promptfed.strategies.distillation import distil
from tests.support import LABELS, bench, client_data, finish, replies, sentences

PROMPT = PromptSet(
    labels=LABELS,
    prompts=(PromptTemplate(text="Text: {text}\nLabel:", words=LABELS),),
    weights=(1.0,),
    bias=(0.0, 0.0),
)


def federation(**changes: Any) -> Federation:
    fields: dict[str, Any] = {
        "clients": {"a": 8, "b": 8},
        "labels": LABELS,
        "words": LABELS,
        "instruction": "Which label?",
        "public": tuple(f"public {i}" for i in range(10)),
        "unlabelled": {"a": 30, "b": 10},
        "max_fm_calls": 100,
        "max_prompts": 3,
        "seed": 1,
    }
    return Federation(**{**fields, **changes})


def learning(round_: Round) -> Mapping[str, Reply]:
    bodies: dict[str, ReplyBody] = {}
    for client, task in round_.tasks.items():
        if isinstance(task, Teach):
            bodies[client] = Votes(n_labels=2, shares=bytes([ord(client)]) * (2 * len(task.texts)))
        elif isinstance(task, Distil):
            bodies[client] = Distilled(n_lessons=task.stop, n=8, before=6.0, after=7.0, diff_sq=0.5)
    return replies(bodies)


def test_public_texts_are_dealt_out_and_what_was_said_of_them_goes_to_all() -> None:
    (teach, give), learned = finish(distil(federation(), dict.fromkeys("ab", PROMPT), 40), learning)

    # A fifth of 40 calls is 8 texts, four a client; the other 32 calls go by unlabelled texts, 30 and 10.
    assert {c: t.texts for c, t in teach.tasks.items() if isinstance(t, Teach)} == {
        "a": ("public 0", "public 2", "public 4", "public 6"),
        "b": ("public 1", "public 3", "public 5", "public 7"),
    }
    assert dict(teach.grants) == {"a": 4, "b": 4}
    assert dict(give.grants) == {"a": 24, "b": 8}
    (lessons,) = {t.lessons for t in give.tasks.values() if isinstance(t, Distil)}
    assert lessons is not None
    assert lessons.texts == (*teach.tasks["a"].texts, *teach.tasks["b"].texts)  # type: ignore[union-attr]
    assert lessons.shares == b"a" * 8 + b"b" * 8
    assert (learned.n, learned.before, learned.after) == (16, 0.75, 0.875)
    # Mean difference 1/8, mean square 1/16: variance 3/64 over 16 texts.
    assert learned.error == pytest.approx((3 / 64 / 16) ** 0.5)


def test_a_set_of_prompts_costs_a_call_each() -> None:
    pair = PromptSet(labels=LABELS, prompts=PROMPT.prompts * 2, weights=(0.5, 0.5), bias=(0.0, 0.0))

    (give,), _ = finish(distil(federation(public=()), dict.fromkeys("ab", pair), 40), learning)

    assert {c: t.stop for c, t in give.tasks.items() if isinstance(t, Distil)} == {"a": 15, "b": 5}
    assert sum(give.grants.values()) == 40


def test_without_unlabelled_texts_the_public_ones_teach() -> None:
    (teach, give), _ = finish(distil(federation(unlabelled={}), dict.fromkeys("ab", PROMPT), 40), learning)

    assert sum(teach.grants.values()) == 8
    assert sum(give.grants.values()) == 0


def test_nobody_who_learned_is_a_run_error() -> None:
    with pytest.raises(RunError, match="no client learned"):
        finish(
            distil(federation(public=()), dict.fromkeys("ab", PROMPT), 40),
            lambda _: replies({"a": Failed(reason="E")}),
        )


def test_clients_learn_from_a_scripted_fm() -> None:
    def few_labels(client_id: str, n_train: int, n_test: int, seed: int, n_words: int) -> ClientData:
        data = client_data(client_id, 4, n_test, seed=seed, n_words=n_words)
        return replace(data, unlabelled=sentences(n_train, 100 + seed, n_words=n_words).texts)

    shots = sentences(16, seed=7)
    shown = "".join(f"Text: {t}\nLabel: {LABELS[y]}\n\n" for t, y in zip(shots.texts, shots.labels, strict=True))
    prompt = replace(PROMPT, prompts=(PromptTemplate(text=shown + "Text: {text}\nLabel:", words=LABELS),))
    scene = bench(n_train=60, n_test=40, data=few_labels)
    before = {c: client.domain.own for c, client in scene.clients.items()}
    some = scene.federation(unlabelled=dict.fromkeys(scene.clients, 60), public=())

    learned = scene.drive(distil(some, dict.fromkeys(scene.clients, prompt), 10_000, min_confidence=0.0), 10_000)

    assert dict(learned.n_lessons) == dict.fromkeys(scene.clients, 60)
    for c, client in scene.clients.items():
        test = client.data.test
        old, new = (
            m.predict_proba(test.texts)[range(len(test)), test.labels] for m in (before[c], client.domain.model)
        )
        assert new.mean() > old.mean()
