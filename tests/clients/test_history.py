"""A client's history: the same reply to the same task, whatever was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.history import TaskHistory
from promptfed.errors import DataError
from tests.support import full_after

DONE = [(b"task 1", b"reply 1"), (b"task 2", b"reply 2"), (b"task 3", b"")]


def written(path: Path) -> Path:
    history = TaskHistory(path)
    for task, reply in DONE:
        history.add(task, reply)
    return path


def test_what_was_done_is_known_to_the_next_process(tmp_path: Path) -> None:
    history = TaskHistory(written(tmp_path / "own" / "history.msgpack"))

    assert history.tasks == (b"task 1", b"task 2", b"task 3")
    assert history.reply_to(b"task 2") == b"reply 2"
    assert history.reply_to(b"task 3") == b""
    assert history.reply_to(b"task 4") is None


def test_without_a_path_only_the_last_reply_is_kept_for_a_task_that_comes_twice() -> None:
    history = TaskHistory(None)
    history.add(b"task 1", b"reply 1")
    history.add(b"task 2", b"reply 2")

    assert history.reply_to(b"task 1") is None
    assert history.reply_to(b"task 2") == b"reply 2"
    assert history.tasks == ()


@given(cut=st.integers(0, 200))
@settings(deadline=None, max_examples=60)
def test_a_cut_takes_only_what_it_cut_and_more_can_be_written(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = written(tmp_path_factory.mktemp("cut") / "history.msgpack")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: min(cut, size)])

    first = TaskHistory(path)
    n = len(first.tasks)
    first.add(b"task 9", b"reply 9")
    second = TaskHistory(path)

    assert first.tasks[:n] == tuple(task for task, _ in DONE[:n])
    assert n == 3 or cut < size
    assert second.tasks == (*(task for task, _ in DONE[:n]), b"task 9")


@pytest.mark.parametrize("content", [b"\x01\x02\x03", b"\x93\x01\x02\x03", b"\x92\x01\x02", b"text that is no history"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "history.msgpack"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"history\.msgpack: not a history of this version"):
        TaskHistory(path)

    assert path.read_bytes() == content


def test_a_disk_that_was_full_for_a_moment_takes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "history.msgpack")
    history, whole = TaskHistory(path), path.read_bytes()

    full_after(monkeypatch, 3)
    with pytest.raises(OSError, match="No space"):
        history.add(b"task 4", b"reply 4")
    monkeypatch.undo()
    assert path.read_bytes() == whole
    history.add(b"task 5", b"reply 5")

    assert TaskHistory(path).tasks == (b"task 1", b"task 2", b"task 3", b"task 5")
