"""``co_tune``: prompts and domain models in turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients.data import ClientData
from promptfed.prompts.grammar import Draft
from promptfed.strategies.base import Steps
from promptfed.strategies.co_tune import CoTune
from promptfed.strategies.pool import Pool
from promptfed.strategies.session import Session
from tests.contracts.method import MethodContract
from tests.support import bench, client_data, pooled_accuracy, sentences


class TestCoTune(MethodContract):
    sometimes = frozenset({"unlearn"})

    def method(self) -> CoTune:
        return CoTune()


def few_labels(client_id: str, n_train: int, n_test: int, seed: int, n_words: int) -> ClientData:
    data = client_data(client_id, 12, n_test, seed=seed, n_words=n_words)
    return replace(data, unlabelled=sentences(n_train, 100 + seed, n_words=n_words).texts)


def events(scene: Any, kind: str) -> list[Any]:
    return [e for e in scene.events.events if e["kind"] == kind]


def test_domain_models_are_taught_between_the_turns_and_vote_anew() -> None:
    scene = bench(n_train=60, n_words=2, data=few_labels)
    federation = scene.federation(max_fm_calls=900, unlabelled=dict.fromkeys(scene.clients, 60))

    scene.drive(CoTune(min_confidence=0.0).run(federation), 900)

    names = [e["name"] for e in events(scene, "round")]
    assert names.count("distil") == 1
    assert "vote" in names[names.index("distil") :]
    assert all(len(client.domain.taught) > 0 for client in scene.clients.values())
    assert scene.fm.n_calls <= 900


class Settled(CoTune):
    """No new prompt is ever found."""

    def _later(self, session: Session, pool: Pool, finalists: list[Draft], *_: Any) -> Steps[tuple[Pool, list[Draft]]]:
        yield from ()
        return pool, finalists


def test_turns_that_help_neither_end() -> None:
    """The FM is never sure enough to teach."""
    scene = bench(n_train=60, n_words=2, data=few_labels)
    federation = scene.federation(max_fm_calls=3000, unlabelled=dict.fromkeys(scene.clients, 60), public=())

    scene.drive(Settled(n_turns=6, min_confidence=1.0).run(federation), 3000)

    turns = events(scene, "turn")
    assert len(turns) == 5
    assert not any(turn["taught"] or turn["found"] or turn["goes_on"] for turn in turns)
    assert [e["name"] for e in events(scene, "round")].count("distil") == 1


def test_it_is_better_than_what_it_starts_from() -> None:
    scene = bench(n_train=60, n_words=2, data=few_labels)
    federation = scene.federation(max_fm_calls=900, unlabelled=dict.fromkeys(scene.clients, 60))

    prompt = scene.drive(CoTune(min_confidence=0.0).run(federation), 900)

    assert pooled_accuracy(prompt, 200, 7) > 0.75
