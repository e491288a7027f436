"""The event log: what happened in a run, one JSON object a line, in the order of rounds. It carries no client text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from promptfed.errors import DataError
from promptfed.files import cut_back

Listener = Callable[[Mapping[str, Any]], None]


class EventLog:
    """Appends events to a file (or keeps them in memory) and tells listeners, such as a progress bar.

    A log that exists is gone through again by the run that resumes: events must be those that it holds, and keep their
    times; what comes after is appended.
    """

    def __init__(self, path: Path | None = None, listeners: tuple[Listener, ...] = ()) -> None:
        self._path, self._listeners = path, listeners
        self._past: list[dict[str, Any]] = []
        if path is not None and path.exists():
            cut_back(path)
            self._past = read_events(path)
        self.events: list[dict[str, Any]] = []

    def add(self, kind: str, data: Mapping[str, Any]) -> None:
        """Raises `DataError` where a run that resumes differs from what was logged."""
        event = {"seq": len(self.events), "time_s": round(time.time(), 3), "kind": kind, **data}
        line = json.dumps(event, ensure_ascii=False)
        if len(self.events) < len(self._past):
            event = self._again(json.loads(line), self._past[len(self.events)])
        else:
            self._append(line)
        self.events.append(event)
        for listener in self._listeners:
            listener(event)

    def _append(self, line: str) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _again(self, now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        if timeless(now) != timeless(before):
            raise DataError(
                f"{self._path}: event {now['seq']} ({before.get('kind')!r}) came out differently ({now['kind']!r}): "
                "the data, the configuration or promptfed changed since the run began. Start anew with promptfed run"
            )
        return before


def timeless(event: Mapping[str, Any]) -> dict[str, Any]:
    """What of an event is the same whenever the run is done."""
    return {key: value for key, value in event.items() if key != "time_s"}


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a run folder's events.jsonl. (Not `splitlines`: text of the FM may hold other line separators.)"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
