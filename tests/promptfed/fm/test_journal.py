"""Answers kept on disk: recorded once, replayed, and whole again after a cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import DataError
from promptfed.fm.journal import RecordingFM, ReplayFM, read_journal, request_key
from promptfed.fm.scripted import ScriptedFM
from promptfed.types import FMRequest, LabelRequest, TextRequest
from tests.support import CountingFM, FailingFM, full_after, wait_for

LABEL = LabelRequest(prefix="Text:", text=" a private text", suffix="\nLabel:", labels=(" bad", " good"))
WRITE = TextRequest(prompt="Write:", max_tokens=5, temperature=0.5, top_p=0.9, seed=3)


def requests(n: int) -> list[FMRequest]:
    return [replace(LABEL, text=f" private {i}") for i in range(n)]


def recording(path: Path) -> tuple[RecordingFM, CountingFM]:
    inner = CountingFM(ScriptedFM())
    return RecordingFM(inner, path), inner


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (LABEL, [{"prefix": "x"}, {"text": "x"}, {"suffix": "x"}, {"labels": (" good", " bad")}]),
        (WRITE, [{"prompt": "x"}, {"max_tokens": 6}, {"temperature": 0.6}, {"top_p": 1.0}, {"seed": 4}, {"stop": ()}]),
    ],
)
def test_everything_that_an_answer_depends_on_is_in_the_key(base: FMRequest, changes: list[dict[str, object]]) -> None:
    keys = {request_key("fm", base), request_key("other fm", base)}
    keys |= {request_key("fm", replace(base, **change)) for change in changes}  # type: ignore[arg-type]

    assert len(keys) == 2 + len(changes)
    assert request_key("fm", base) == request_key("fm", replace(base))


def test_where_prefix_and_text_part_is_in_the_key() -> None:
    a, b = replace(LABEL, prefix="ab", text="c"), replace(LABEL, prefix="a", text="bc")

    assert request_key("fm", a) != request_key("fm", b)


# ---------------------------------------------------------------- record and replay


def test_what_was_recorded_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "journal.jsonl"
    first, _ = recording(path)
    answers = wait_for(first.complete([LABEL, WRITE]))

    second, inner = recording(path)
    again = wait_for(second.complete([WRITE, LABEL]))

    assert again == [answers[1], answers[0]]
    assert inner.n_calls == 0
    assert second.fm_id == ScriptedFM().fm_id


def test_only_what_is_missing_is_asked_and_twins_are_asked_once(tmp_path: Path) -> None:
    fm, inner = recording(tmp_path / "j.jsonl")
    wait_for(fm.complete(requests(2)))

    answers = wait_for(fm.complete([*requests(3), *requests(3)]))

    assert inner.batches == [2, 1]
    assert answers[:3] == answers[3:]
    assert all(a.logprobs is not None for a in answers)


def test_answers_are_on_disk_before_they_count(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    fm, _ = recording(path)

    answers = wait_for(fm.complete(requests(3)))

    assert list(read_journal(path).values()) == answers


def test_failures_are_returned_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"

    (answer,) = wait_for(RecordingFM(FailingFM(), path).complete([LABEL]))

    assert answer.error == "refused"
    assert not path.exists()


def test_label_requests_leave_no_text_in_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    fm, _ = recording(path)

    wait_for(fm.complete([LABEL, WRITE]))

    assert "private" not in path.read_text()
    assert "Write:" not in path.read_text()


def test_replay_answers_from_the_journal_and_calls_nobody(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    fm, _ = recording(path)
    answers = wait_for(fm.complete([LABEL]))

    replayed = wait_for(ReplayFM(path, fm.fm_id).complete([LABEL, WRITE]))

    assert replayed[0] == answers[0]
    assert replayed[1].error == "not in the journal"
    assert replayed[1].text is None


def test_another_model_does_not_find_the_answers_of_this_one(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    fm, _ = recording(path)
    wait_for(fm.complete([LABEL]))

    (answer,) = wait_for(ReplayFM(path, "another@1").complete([LABEL]))

    assert answer.error == "not in the journal"


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none.jsonl") == {}


# ---------------------------------------------------------------- damage


def journal(path: Path, n: int = 3) -> bytes:
    fm, _ = recording(path)
    wait_for(fm.complete(requests(n)))
    return path.read_bytes()


@given(cut=st.integers(1, 400))
@settings(deadline=None, max_examples=30)
def test_a_last_line_that_was_cut_off_is_ignored(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("j") / "j.jsonl"
    whole = journal(path)
    lines = whole.splitlines(keepends=True)
    kept = whole[: -min(cut, len(lines[-1]))]
    path.write_bytes(kept)

    # With only the line's end gone the line itself is whole.
    assert len(read_journal(path)) == (3 if cut == 1 else 2)


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_recording_goes_on_after_a_cut_and_the_journal_is_whole_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(journal(path)[:-cut])

    fm, _ = recording(path)
    answers = wait_for(fm.complete(requests(6)))

    assert len(read_journal(path)) == 6
    again, inner = recording(path)
    assert wait_for(again.complete(requests(6))) == answers
    assert inner.n_calls == 0


@pytest.mark.parametrize(
    "line",
    [
        "rubbish",
        "{}",
        "[]",
        "3",
        "null",
        '"text"',
        '{"key": "k"}',
        '{"answer": {}}',
        '{"key": "k", "answer": null}',
        '{"key": "k", "answer": 3}',
        '{"key": "k", "answer": {"unknown_field": 1}}',
        '{"key": "k", "answer": {"logprobs": 3}}',
    ],
)
def test_any_other_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "j.jsonl"
    good = journal(path).decode()
    path.write_text(line + "\n" + good)

    with pytest.raises(DataError, match=r"j\.jsonl, line 1: "):
        read_journal(path)


def test_rubbish_in_bytes_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b"\xff\xfe\n" + journal(path))

    with pytest.raises(DataError):
        read_journal(path)


def test_a_disk_that_was_full_for_a_moment_takes_no_answer_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    fm, _ = recording(path)
    wait_for(fm.complete(requests(2)))

    full_after(monkeypatch, 10)
    with pytest.raises(OSError, match="No space"):
        wait_for(fm.complete(requests(3)))
    monkeypatch.undo()
    wait_for(fm.complete(requests(4)))

    assert len(read_journal(path)) == 4
