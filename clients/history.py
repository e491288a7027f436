"""What a client was asked and what it replied, kept in its own folder so that it can be killed at any moment.

A client that starts again does the tasks anew that brought it to where it was (their FM answers are in the journal),
and answers a task that it has replied to before with the same bytes. Neither tasks nor replies hold client text.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgpack

from promptfed.errors import DataError


class TaskHistory:
    """Tasks and replies in the order in which they were done, in one file. Without a path it keeps nothing.

    A record that was cut off is removed: its task was not replied to and will come again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._done: dict[bytes, bytes] = {}
        if path is not None and path.exists():
            self._done = _read(path)

    @property
    def tasks(self) -> tuple[bytes, ...]:
        """The tasks that were replied to, oldest first."""
        return tuple(self._done)

    def reply_to(self, task: bytes) -> bytes | None:
        """The reply to ``task``, if it was done before."""
        return self._done.get(task)

    def add(self, task: bytes, reply: bytes) -> None:
        """Remember a task that was done."""
        if self._path is None:
            return
        self._done[task] = reply
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(msgpack.packb([task, reply]))


def _read(path: Path) -> dict[bytes, bytes]:
    done: dict[bytes, bytes] = {}
    whole = 0
    with path.open("rb") as file:
        records = msgpack.Unpacker(file)
        try:
            for task, reply in records:
                if not isinstance(task, bytes) or not isinstance(reply, bytes):
                    raise TypeError
                done[task] = reply
                whole = records.tell()
        except (ValueError, TypeError, msgpack.UnpackException):
            raise DataError(f"{path}: not a history of this version; give the client another folder") from None
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return done
