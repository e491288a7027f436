"""The event log: one JSON object a line, in order, told to listeners as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import DataError
from promptfed.federation.events import EventLog, read_events


def test_events_are_numbered_and_read_back(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")

    log.add("start", {"seed": 1})
    log.add("heat", {"best_prompt": "Zwei\nZeilen \u2028 ü"})

    read = read_events(tmp_path / "events.jsonl")
    assert [(e["seq"], e["kind"]) for e in read] == [(0, "start"), (1, "heat")]
    assert read == log.events
    assert read[1]["best_prompt"] == "Zwei\nZeilen \u2028 ü"


def test_each_event_is_on_disk_when_the_listener_hears_of_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    heard: list[tuple[str, int]] = []

    def listener(event: Mapping[str, Any]) -> None:
        heard.append((event["kind"], path.read_text(encoding="utf-8").count("\n")))

    log = EventLog(path, (listener,))
    log.add("one", {})
    log.add("two", {})

    assert heard == [("one", 1), ("two", 2)]


def test_without_a_path_events_are_kept_in_memory() -> None:
    log = EventLog()

    log.add("one", {"n": 1})

    assert log.events[0]["n"] == 1
    assert json.dumps(log.events)


# ---------------------------------------------------------------- going through a log again

EVENTS = [("start", {"seed": 1}), ("heat", {"best_prompt": "ü\u2028"}), ("round", {"round": 1}), ("end", {})]


def write(log: EventLog) -> None:
    for kind, data in EVENTS:
        log.add(kind, data)


@given(cut=st.integers(0, 400))
@settings(deadline=None, max_examples=80)
def test_a_log_cut_anywhere_is_completed_to_the_same_events(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    write(EventLog(path))
    whole = read_events(path)
    path.write_bytes(path.read_bytes()[:cut])
    n_left = path.read_bytes().count(b"\n")

    write(EventLog(path))

    again = read_events(path)
    assert [{**e, "time_s": 0} for e in again] == [{**e, "time_s": 0} for e in whole]
    assert again[:n_left] == whole[:n_left]  # with the times at which they happened


def test_listeners_hear_of_past_events_too(tmp_path: Path) -> None:
    write(EventLog(tmp_path / "events.jsonl"))
    heard: list[str] = []

    write(EventLog(tmp_path / "events.jsonl", (lambda e: heard.append(e["kind"]),)))

    assert heard == ["start", "heat", "round", "end"]


def test_a_run_that_differs_from_its_log_is_stopped_before_it_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(EventLog(path))
    before = path.read_bytes()

    log = EventLog(path)
    log.add("start", {"seed": 1})
    with pytest.raises(DataError, match=r"events\.jsonl: event 1 \('heat'\) came out differently"):
        log.add("heat", {"best_prompt": "another"})

    assert path.read_bytes() == before
