"""``co_tune``: prompts and domain models in turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients.data import ClientData
from promptfed.strategies.co_tune import CoTune
from tests.contracts.method import MethodContract
from tests.support import bench, client_data, pooled_accuracy, sentences


class TestCoTune(MethodContract):
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


def test_turns_that_help_neither_end() -> None:
    """The FM is never sure enough to teach: the domain models stay as they are, and vote once."""
    scene = bench(n_train=60, n_words=2, data=few_labels)
    federation = scene.federation(max_fm_calls=1500, unlabelled=dict.fromkeys(scene.clients, 60), public=())

    scene.drive(CoTune(n_turns=4, min_confidence=1.0).run(federation), 1500)

    turns = events(scene, "turn")
    assert [turn["taught"] for turn in turns] == [False] * len(turns)
    ended = [turn["goes_on"] for turn in turns]
    n_taught = [e["name"] for e in events(scene, "round")].count("distil")
    assert n_taught == (ended.index(False) + 1 if False in ended else len(turns))


def test_it_is_better_than_what_it_starts_from() -> None:
    scene = bench(n_train=60, n_words=2, data=few_labels)
    federation = scene.federation(max_fm_calls=900, unlabelled=dict.fromkeys(scene.clients, 60))

    prompt = scene.drive(CoTune(min_confidence=0.0).run(federation), 900)

    assert pooled_accuracy(prompt, 200, 7) > 0.75
