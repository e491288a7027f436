"""The event log: what happened in a run, one JSON object a line, in the order of rounds. It carries no client text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Listener = Callable[[Mapping[str, Any]], None]


class EventLog:
    """Appends events to a file (or keeps them in memory) and tells listeners, such as a progress bar."""

    def __init__(self, path: Path | None = None, listeners: tuple[Listener, ...] = ()) -> None:
        self._path, self._listeners = path, listeners
        self.events: list[dict[str, Any]] = []

    def add(self, kind: str, data: Mapping[str, Any]) -> None:
        event = {"seq": len(self.events), "time_s": round(time.time(), 3), "kind": kind, **data}
        self.events.append(event)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")
        for listener in self._listeners:
            listener(event)


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a run folder's events.jsonl. (Not `splitlines`: text of the FM may hold other line separators.)"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
