"""The event log: one JSON object a line, in order, told to listeners as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
