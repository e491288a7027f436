"""Baselines: given prompts, and another method by each client alone or on all texts in one place."""

from __future__ import annotations

from typing import ClassVar

import pytest

from promptfed.errors import ConfigError, UnknownNameError
from promptfed.registry import load_method
from promptfed.strategies.base import Federation, Reading, Strategy
from promptfed.strategies.baselines import (
    Centralised,
    LocalOnly,
    ManualFewShot,
    ZeroShot,
    each_alone,
    manual_prompt,
    most_texts,
    zero_shot_prompt,
)
from promptfed.strategies.race import Race
from tests.contracts.method import MethodContract
from tests.support import LABELS, bench

HAND = "It seems superb.\nLabel: positive\n\nText: {text}\nLabel:"


class TestZeroShot(MethodContract):
    budget: ClassVar[int] = 90

    def method(self) -> Strategy:
        return ZeroShot()


class TestManualFewShot(MethodContract):
    budget: ClassVar[int] = 90
    by_hand: str | None = None

    def method(self) -> Strategy:
        return ManualFewShot(prompt=self.by_hand)

    def test_it_works_for_six_labels_that_clients_hold_unevenly(self) -> None:
        self.by_hand = "Note: {text}\nTopic:"  # only for two labels there is one to fall back on
        super().test_it_works_for_six_labels_that_clients_hold_unevenly()


class TestLocalOnly(MethodContract):
    budget: ClassVar[int] = 90

    def method(self) -> Strategy:
        return LocalOnly(inner="zero_shot")


class TestCentralised(MethodContract):
    """Where the texts are put together is the conductor's affair: see test_app."""

    def method(self) -> Strategy:
        return Centralised(inner="zero_shot")


def federation(labels: tuple[str, ...] = LABELS, instruction: str = "Judge.") -> Federation:
    return Federation(
        clients={"a": 5},
        labels=labels,
        words=labels,
        instruction=instruction,
        public=(),
        max_fm_calls=10,
        max_prompts=1,
        seed=1,
    )


def test_a_given_prompt_is_scored_and_calibrated_for_so_many_calls() -> None:
    scene = bench(2, 10)

    prompt = scene.drive(ManualFewShot(prompt=HAND).run(scene.federation(max_fm_calls=12)), 12)

    assert [p.text for p in prompt.prompts] == [HAND]
    assert scene.fm.n_calls == 12
    assert prompt.weights[0] > 0


def test_a_given_prompt_is_read_at_milestones_on_the_texts_that_they_pay_for_and_no_more_than_there_are() -> None:
    scene, readings = bench(2, 10), list[Reading]()

    scene.drive(ZeroShot().run(scene.federation(max_fm_calls=50, milestones=(8, 15), read=readings.append)), 50)

    assert [(r.milestone, r.fm_calls, r.stop) for r in readings] == [(8, 8, 4), (15, 14, 7), (50, 20, 10)]
    assert scene.fm.n_calls == 20


# ---------------------------------------------------------------- each client alone


def test_each_client_alone_comes_to_what_it_would_without_the_others() -> None:
    together, readings = bench(3, 20), list[Reading]()

    prompt = together.drive(
        LocalOnly().run(together.federation(max_fm_calls=600, milestones=(450,), read=readings.append)), 600
    )

    own = readings[-1].by_client
    assert [(r.milestone, sorted(r.by_client)) for r in readings] == [
        (m, ["client0", "client1", "client2"]) for m in (450, 600)
    ]
    assert [[r.by_client[c].milestone for c in sorted(own)] for r in readings] == [[150] * 3, [200] * 3]
    assert all(r.fm_calls == sum(mine.fm_calls for mine in r.by_client.values()) for r in readings)
    for client in own:
        single, found = bench(3, 20), list[Reading]()
        mine = single.federation(
            clients={client: 20}, max_fm_calls=200, milestones=(150,), log=lambda *_: None, read=found.append
        )
        single.drive(Race().run(mine), 200)
        assert [found[0], found[1]] == [r.by_client[client] for r in readings]
    assert len({reading.prompt.prompt_id for reading in own.values()}) == 3
    assert prompt == own["client0"].prompt  # all have as many texts: the first


def test_the_client_with_most_texts_stands_for_all() -> None:
    sizes = {"a": 5, "b": 9, "c": 9, "d": 2}

    assert most_texts(bench().federation(clients=sizes), sizes) == "b"
    assert most_texts(bench().federation(clients=sizes), ["a", "d"]) == "a"


def test_a_share_that_is_too_small_is_told_before_any_round() -> None:
    with pytest.raises(ConfigError, match=r"alone has its share .*max_fm_calls = 20 is too small .* times the number"):
        next(LocalOnly().run(bench(3).federation(max_fm_calls=60)))


def test_an_inner_method_is_checked_when_it_is_named() -> None:
    made = load_method("local_only", {"inner": "manual_few_shot", "inner_options": {"prompt": HAND}})

    assert made.needs == ManualFewShot.needs
    assert made.card.sends == ManualFewShot.card.sends
    assert made.card.paper == "baseline around manual_few_shot: baseline: a hand-written prompt"
    with pytest.raises(UnknownNameError, match="did you mean 'race'"):
        load_method("local_only", {"inner": "rase"})
    with pytest.raises(UnknownNameError, match="unknown option of method 'zero_shot' 'prompt'"):
        load_method("centralised", {"inner": "zero_shot", "inner_options": {"prompt": HAND}})


def test_each_alone_reads_without_those_who_are_gone() -> None:
    """One client never answers: the others' readings are told all the same, and theirs alone."""
    scene, readings = bench(2, 10), list[Reading]()
    federation = scene.federation(
        clients={"client0": 10, "client1": 10, "gone": 50}, max_fm_calls=30, read=readings.append
    )

    prompt = scene.drive(each_alone(ZeroShot(), federation), 30)

    assert [sorted(r.by_client) for r in readings] == [["client0", "client1"]]
    assert readings[0].prompt == prompt == readings[0].of("client0").prompt
    assert readings[0].of("gone").prompt == prompt


def test_zero_shot_is_the_instruction_and_an_empty_form() -> None:
    assert zero_shot_prompt(federation()).text == "Judge.\n\nText: {text}\nLabel:"
    assert zero_shot_prompt(federation(instruction="")).text == "Text: {text}\nLabel:"
    assert zero_shot_prompt(federation()).words == LABELS


def test_the_projects_own_prompt_labels_its_exemplars_rightly_in_any_order_of_labels() -> None:
    for labels in (LABELS, LABELS[::-1]):
        template = manual_prompt(federation(labels), None)

        assert "Text: I loved it.\nSentiment: positive\n" in template.text
        assert "Text: It was awful.\nSentiment: negative\n" in template.text
        assert template.words == labels


def test_a_given_text_is_used_as_it_is() -> None:
    assert manual_prompt(federation(), "Say: {text} =").text == "Say: {text} ="


def test_a_given_text_without_a_slot_is_refused() -> None:
    with pytest.raises(ConfigError, match="slot"):
        manual_prompt(federation(), "Say:")


def test_other_labels_need_a_prompt_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"manual_prompt"):
        manual_prompt(federation(("sports", "politics")), None)
