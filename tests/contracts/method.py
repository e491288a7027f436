"""What every method has to keep. Subclass `MethodContract` in the method's own test module and give it the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import pytest

from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Failed, Reply, decode_reply, decode_task, encode
from promptfed.prompts.artefact import PromptSet
from promptfed.strategies.base import Reading, Strategy, needs_of
from promptfed.types import satisfies
from tests.support import Bench, bench

# Words that stand in each client's texts and nowhere else: none of them may cross the wire.
CANARIES = ("zyzzyva", "quokkaville", "brontefish")
# Public texts of more words than a client lets a server ask about at once: what a method asks must stay below that.
WORDY = tuple(" ".join(map("".join, product(first, "abcdefgh", "ijklmn"))) for first in "abcdefghijklmnopqrstuv")


class Wire:
    """A transport that keeps what it carries; ``mute`` clients don't answer method tasks (they do join)."""

    def __init__(self, inner: Any, mute: frozenset[str] = frozenset()) -> None:
        self._inner, self._mute = inner, mute
        self.up: list[bytes] = []
        self.down: list[bytes] = []

    async def exchange(self, tasks: Mapping[str, bytes], awaited: Any, deadline_s: Any) -> dict[str, bytes]:
        self.down += tasks.values()
        replies: dict[str, bytes] = await self._inner.exchange(tasks, awaited, deadline_s)
        for client in self._mute & replies.keys():
            task = decode_task(tasks[client])
            spent = decode_reply(replies[client]).usage
            failed = Reply(round=task.round, client_id=client, usage=spent, body=Failed(reason="Lost"))
            replies[client] = encode(failed)
        self.up += replies.values()
        return replies


class MethodContract:
    """``method`` is what is tested, ``sometimes`` the tasks that it need not send in every run; `fm` makes a foundation
    model that it can work with (no weights: it runs in seconds), and ``budget`` is enough for it to search at all, with
    three clients of twenty texts."""

    budget: ClassVar[int] = 600
    sometimes: ClassVar[frozenset[str]] = frozenset()
    # What `tests.support.bench` is told of the task, if it is another one than to tell negative from positive.
    task: ClassVar[Mapping[str, Any]] = {}

    def method(self) -> Strategy:
        raise NotImplementedError

    def fm(self) -> BaseFM:
        return ScriptedFM()

    def scene(self, **changes: Any) -> Bench:
        """Three clients whose texts hold a canary each."""
        settings = {**self.task, **changes}
        made = bench(fm=self.fm(), max_fm_calls=self.budget, soft_space=self.fm().soft_space, **settings)
        for canary, client in zip(CANARIES, made.clients.values(), strict=False):
            train = client.data.train
            texts = tuple(f"{text} {canary} {i}" for i, text in enumerate(train.texts))
            client.data = replace(client.data, train=replace(train, texts=texts))
            client.scores.data = client.data.train
        return made

    def run(self, scene: Bench, **changes: Any) -> tuple[PromptSet, list[Reading]]:
        readings: list[Reading] = []
        federation = scene.federation(read=readings.append, **changes)
        return scene.drive(self.method().run(federation), federation.max_fm_calls), readings

    # ------------------------------------------------------------------------------------------------ what is kept

    def test_it_says_what_it_needs_and_the_model_has_it(self) -> None:
        method, offered = self.method(), self.fm().capabilities

        assert method.needs
        kind = "classification" if self.task.get("labels", True) else "generation"
        assert kind in method.card.kinds
        assert all(satisfies(offered, wanted) for wanted in needs_of(method, kind))
        assert method.card.paper
        assert method.card.crosses
        assert method.card.sends

    def test_it_spends_no_more_than_its_budget_and_all_of_it_is_booked(self) -> None:
        scene = self.scene()

        prompt, _ = self.run(scene)

        assert 0 < scene.fm.n_calls <= self.budget
        assert scene.ledger.total("tuning").fm_calls == scene.fm.n_calls
        assert 1 <= len(prompt.prompts) <= 2
        assert not any(e["failures"] for e in scene.events.events if e["kind"] == "round")

    def test_it_is_read_at_every_milestone_within_its_calls(self) -> None:
        scene = self.scene()
        milestones = (self.budget // 3, self.budget // 2)

        prompt, readings = self.run(scene, milestones=milestones)

        assert [r.milestone for r in readings] == [*milestones, self.budget]
        assert all(r.fm_calls <= r.milestone for r in readings)
        assert [r.fm_calls for r in readings] == sorted(r.fm_calls for r in readings)
        assert readings[-1].prompt == prompt
        assert all(len(r.single.prompts) == 1 and r.single.prompts[0] == r.prompt.prompts[0] for r in readings)

    def test_the_same_seed_gives_the_same_prompt(self) -> None:
        first, again = (self.run(self.scene())[0] for _ in range(2))

        assert first.prompt_id == again.prompt_id

    def test_it_is_a_function_of_the_replies(self) -> None:
        scene = self.scene()
        federation = scene.federation()
        seen: list[Mapping[str, Reply]] = []

        def watched() -> Any:
            steps = self.method().run(federation)
            try:
                round_ = next(steps)
                while True:
                    seen.append((yield round_))
                    round_ = steps.send(seen[-1])
            except StopIteration as done:
                return done.value

        prompt = scene.drive(watched(), self.budget)
        steps, replayed = self.method().run(scene.federation()), None
        next(steps)
        try:
            for replies in seen:
                steps.send(replies)
        except StopIteration as done:
            replayed = done.value

        assert replayed == prompt

    def test_no_text_of_a_client_crosses_the_wire(self) -> None:
        wires: list[Wire] = []
        scene = self.scene(wrap=lambda inner: wires.append(Wire(inner)) or wires[0])

        self.run(scene)

        crossed = b"".join([*wires[0].up, *wires[0].down]).lower()
        assert crossed
        assert not [canary for canary in CANARIES if canary.encode() in crossed]

    def test_it_sends_what_its_card_says(self) -> None:
        wires: list[Wire] = []
        scene = self.scene(wrap=lambda inner: wires.append(Wire(inner)) or wires[0])

        self.run(scene)

        sent = {decode_task(task).body.kind for task in wires[0].down}
        of_labels = {"weigh", "vote", "newton"} if self.task.get("labels", True) == () else set()
        assert sent | self.sometimes == set(self.method().card.sends) - of_labels

    @pytest.mark.parametrize("n_milestones", [0, 1])
    def test_a_client_that_fails_every_task_costs_its_part_only(self, n_milestones: int) -> None:
        scene = self.scene(wrap=lambda inner: Wire(inner, mute=frozenset({"client1"})))

        prompt, _ = self.run(scene, milestones=(self.budget // 2,)[:n_milestones])

        assert len(prompt.prompts) >= 1
        assert scene.fm.n_calls <= self.budget

    def test_it_works_for_six_labels_that_clients_hold_unevenly(self) -> None:
        scene = bench(10, 10, fm=self.fm(), topics=True, max_fm_calls=3 * self.budget, soft_space=self.fm().soft_space)
        public = (*scene.federation().public, *WORDY)

        prompt, readings = self.run(scene, milestones=(2 * self.budget,), public=public)

        assert len(readings) == 2
        assert all(len(p.words) == 6 for p in prompt.prompts)
        assert 0 < scene.fm.n_calls <= 3 * self.budget
        assert not any(e["failures"] for e in scene.events.events if e["kind"] == "round")

    def test_a_budget_that_is_too_small_is_refused_before_the_first_call_or_kept(self) -> None:
        scene = self.scene()

        refused = ""
        try:
            self.run(scene, max_fm_calls=4)
        except ConfigError as error:
            refused = str(error)

        assert scene.fm.n_calls <= (0 if refused else 4)
        assert not refused or "budget" in refused

    def test_the_prompt_can_be_saved_and_read(self, tmp_path: Any) -> None:
        prompt, _ = self.run(self.scene())

        prompt.save(tmp_path / "prompt.json")

        assert PromptSet.load(tmp_path / "prompt.json") == prompt
