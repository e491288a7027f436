"""Checkpoints: a round is there whole or not at all, and a run that was cut off ends where it would have ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from promptfed.errors import DataError
from promptfed.federation.checkpoint import Checkpoint
from promptfed.strategies.race import Race
from tests.support import bench

TASKS = {"a": b"task a", "b": b"task b"}
REPLIES = {"a": b"reply a"}


def test_a_saved_round_comes_back(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save(3, TASKS, REPLIES, 1.5)

    assert Checkpoint(tmp_path).load(3, TASKS) == (REPLIES, 1.5)


def test_a_round_that_was_not_done_is_none(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(3, TASKS, REPLIES, 0.0)

    assert checkpoint.load(2, TASKS) is None
    assert checkpoint.load(4, TASKS) is None


@pytest.mark.parametrize("tasks", [{}, {"a": b"task a"}, {**TASKS, "a": b"other"}, {**TASKS, "c": b"task c"}])
def test_a_round_of_other_tasks_is_refused(tmp_path: Path, tasks: dict[str, bytes]) -> None:
    Checkpoint(tmp_path).save(1, TASKS, REPLIES, 0.0)

    with pytest.raises(DataError, match=r"00001\.msgpack: belongs to another configuration"):
        Checkpoint(tmp_path).load(1, tasks)


def test_without_a_folder_nothing_is_kept() -> None:
    checkpoint = Checkpoint(None)
    checkpoint.save(1, TASKS, REPLIES, 0.0)

    assert checkpoint.load(1, TASKS) is None


def test_a_write_that_was_cut_off_is_no_round(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save(1, TASKS, REPLIES, 0.0)
    whole = (tmp_path / "00001.msgpack").read_bytes()
    (tmp_path / "00002.msgpack.tmp").write_bytes(whole[: len(whole) // 2])

    assert Checkpoint(tmp_path).load(2, TASKS) is None
    assert [p.name for p in tmp_path.glob("*.msgpack")] == ["00001.msgpack"]


class CutOff:
    """A transport that is cut off before its n-th exchange."""

    class PowerFailureError(RuntimeError):
        pass

    def __init__(self, inner: Any, after: int) -> None:
        self._inner, self.left = inner, after

    async def exchange(self, tasks: Mapping[str, bytes], *rules: Any) -> dict[str, bytes]:
        if self.left == 0:
            raise self.PowerFailureError
        self.left -= 1
        replies: dict[str, bytes] = await self._inner.exchange(tasks, *rules)
        return replies


class Counting:
    """A transport that counts its exchanges."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.n = inner, 0

    async def exchange(self, tasks: Mapping[str, bytes], *rules: Any) -> dict[str, bytes]:
        self.n += 1
        replies: dict[str, bytes] = await self._inner.exchange(tasks, *rules)
        return replies


BUDGET = 300


def test_replaying_a_whole_run_asks_no_client_and_ends_in_the_same_prompt(tmp_path: Path) -> None:
    first = bench(2, 12, checkpoint=Checkpoint(tmp_path))
    prompt = first.drive(Race().run(first.federation()), BUDGET * 2)

    second = bench(2, 12, checkpoint=Checkpoint(tmp_path))
    again = second.drive(Race().run(second.federation()), BUDGET * 2)

    assert again.prompt_id == prompt.prompt_id
    assert second.fm.n_calls == 0


@pytest.mark.parametrize("after", [1, 5, 9, 14])
def test_a_run_cut_off_anywhere_ends_in_the_prompt_of_a_run_that_was_not(tmp_path: Path, after: int) -> None:
    counted: list[Counting] = []

    def counting(transport: Any) -> Counting:
        counted.append(Counting(transport))
        return counted[-1]

    whole = bench(2, 12, max_fm_calls=BUDGET, wrap=counting)
    expected = whole.drive(Race().run(whole.federation()), BUDGET)
    assert counted[0].n > 15  # so every cut below is inside the run

    server, home = tmp_path / "server", tmp_path / "clients"
    broken = bench(
        2,
        12,
        max_fm_calls=BUDGET,
        checkpoint=Checkpoint(server),
        wrap=lambda inner: CutOff(inner, after),
        folder=home,
    )
    with pytest.raises(CutOff.PowerFailureError):
        broken.drive(Race().run(broken.federation()), BUDGET)
    resumed = bench(2, 12, max_fm_calls=BUDGET, checkpoint=Checkpoint(server), folder=home)
    prompt = resumed.drive(Race().run(resumed.federation()), BUDGET)

    assert prompt.prompt_id == expected.prompt_id
    # Rounds that were done are not done again, and answers that were paid for are not paid for again.
    assert broken.fm.n_calls + resumed.fm.n_calls == whole.fm.n_calls
    assert not any(e["failures"] for e in resumed.events.events if e["kind"] == "round")
