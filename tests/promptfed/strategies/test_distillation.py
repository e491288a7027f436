"""The FM teaches the domain models: what is asked of whom, for how many calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from clients.data import ClientData
from promptfed.errors import RunError
from promptfed.messages import Distil, Distilled, Failed, Reply, ReplyBody, Teach, Unlearned, Votes
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Federation, Round
from promptfed.strategies.distillation import Teacher
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
    (teach, give), learned = finish(Teacher().distil(federation(), dict.fromkeys("ab", PROMPT), 40), learning)

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

    (give,), _ = finish(Teacher().distil(federation(public=()), dict.fromkeys("ab", pair), 40), learning)

    assert {c: t.stop for c, t in give.tasks.items() if isinstance(t, Distil)} == {"a": 15, "b": 5}
    assert sum(give.grants.values()) == 40


def test_without_unlabelled_texts_the_public_ones_teach() -> None:
    (teach, give), _ = finish(Teacher().distil(federation(unlabelled={}), dict.fromkeys("ab", PROMPT), 40), learning)

    assert sum(teach.grants.values()) == 8
    assert sum(give.grants.values()) == 0


@pytest.mark.parametrize(("unlabelled", "n_public"), [({}, 10), ({"a": 30, "b": 10}, 8), ({"a": 20, "b": 11}, 9)])
def test_calls_that_nothing_else_can_use_go_into_public_texts(unlabelled: dict[str, int], n_public: int) -> None:
    teacher = Teacher(spends_all=True)

    (teach, give), _ = finish(
        teacher.distil(federation(unlabelled=unlabelled), dict.fromkeys("ab", PROMPT), 40), learning
    )

    assert sum(teach.grants.values()) == n_public
    assert sum(give.grants.values()) <= min(40 - n_public, sum(unlabelled.values()))


def test_nobody_who_learned_is_a_run_error() -> None:
    with pytest.raises(RunError, match="no client learned"):
        finish(
            Teacher().distil(federation(public=()), dict.fromkeys("ab", PROMPT), 40),
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

    teacher = Teacher(min_confidence=0.0)
    learned = scene.drive(teacher.distil(some, dict.fromkeys(scene.clients, prompt), 10_000), 10_000)

    assert dict(learned.n_lessons) == dict.fromkeys(scene.clients, 60)
    for c, client in scene.clients.items():
        test = client.data.test
        old, new = (
            m.predict_proba(test.texts)[range(len(test)), test.labels] for m in (before[c], client.domain.model)
        )
        assert new.mean() > old.mean()


def test_what_was_paid_for_is_not_asked_again() -> None:
    teacher, prompts = Teacher(), dict.fromkeys("ab", PROMPT)
    finish(teacher.distil(federation(), prompts, 20), learning)

    (teach, give), _ = finish(teacher.distil(federation(), prompts, 20), learning)

    # The first four public texts and 12 and 4 of the unlabelled ones were asked about before.
    assert [t.texts for t in teach.tasks.values() if isinstance(t, Teach)] == [
        ("public 4", "public 6"),
        ("public 5", "public 7"),
    ]
    assert {c: t.stop for c, t in give.tasks.items() if isinstance(t, Distil)} == {"a": 24, "b": 8}
    assert dict(give.grants) == {"a": 12, "b": 4}
    (lessons,) = {t.lessons for t in give.tasks.values() if isinstance(t, Distil)}
    assert lessons is not None
    assert sorted(lessons.texts) == [f"public {i}" for i in range(8)]


def test_another_prompt_begins_anew() -> None:
    teacher = Teacher()
    other = replace(PROMPT, bias=(1.0, -1.0))
    finish(teacher.distil(federation(), dict.fromkeys("ab", PROMPT), 20), learning)

    (teach, give), _ = finish(teacher.distil(federation(), dict.fromkeys("ab", other), 20), learning)

    assert sum(teach.grants.values()) == 4
    assert {c: t.stop for c, t in give.tasks.items() if isinstance(t, Distil)} == {"a": 12, "b": 4}


def test_a_client_that_missed_the_lessons_is_asked_about_the_same_texts_again() -> None:
    teacher, prompts = Teacher(), dict.fromkeys("ab", PROMPT)
    finish(teacher.distil(federation(public=()), prompts, 20), lambda r: {"a": learning(r)["a"]})

    (give,), _ = finish(teacher.distil(federation(public=()), prompts, 20), learning)

    # Of b all ten are left, and of a fifteen: 20 calls are four fifths of that.
    assert {c: t.stop for c, t in give.tasks.items() if isinstance(t, Distil)} == {"a": 15 + 12, "b": 8}


@pytest.mark.parametrize(("after", "kept"), [(6.5, True), (6.0, True), (5.9, False)])
def test_lessons_that_lower_the_score_are_taken_back(after: float, kept: bool) -> None:
    logged: list[Mapping[str, Any]] = []
    body = Distilled(n_lessons=3, n=8, before=6.0, after=after, diff_sq=0.5)

    rounds, learned = finish(
        Teacher().distil(
            federation(public=(), log=lambda _, told: logged.append(told)), dict.fromkeys("ab", PROMPT), 20
        ),
        lambda r: replies({c: body if r.name == "distil" else Unlearned() for c in r.tasks}),
    )

    assert learned.kept == kept
    assert [r.name for r in rounds] == ["distil", "unlearn"][: 1 if kept else 2]
    assert logged[0]["kept"] == kept
