"""What a client was asked and what it replied, kept in its own folder so that it can be killed at any moment.

A client that starts again does the tasks anew that brought it to where it was (their FM answers are in the journal),
and answers a task that it has replied to before with the same bytes. Neither tasks nor replies hold client text.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgpack

from promptfed.errors import DataError
from promptfed.files import append_whole


class TaskHistory:
    """Tasks and replies in the order in which they were done, in one file.

    A record that was cut off is removed: its task was not replied to and will come again. Without a path only the last
    reply is kept, for a task that comes twice.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._replies: dict[bytes, bytes] = {}
        self.tasks: tuple[bytes, ...] = ()
        """The tasks that were replied to before this process, oldest first."""
        self.replies: tuple[bytes, ...] = ()
        """What was replied to each of them."""
        if path is not None and path.exists():
            done = _read(path)
            self.tasks = tuple(task for task, _ in done)
            self.replies = tuple(reply for _, reply in done)
            self._replies = {_digest(task): reply for task, reply in done}

    def reply_to(self, task: bytes) -> bytes | None:
        """The reply to ``task``, if it was done before."""
        return self._replies.get(_digest(task))

    def add(self, task: bytes, reply: bytes) -> None:
        """Remember a task that was done."""
        if self._path is None:
            self._replies.clear()
        else:
            append_whole(self._path, msgpack.packb([task, reply]))
        self._replies[_digest(task)] = reply


def _digest(task: bytes) -> bytes:
    return hashlib.sha256(task).digest()


def _read(path: Path) -> list[tuple[bytes, bytes]]:
    done: list[tuple[bytes, bytes]] = []
    whole = 0
    with path.open("rb") as file:
        records = msgpack.Unpacker(file)
        try:
            for task, reply in records:
                if not isinstance(task, bytes) or not isinstance(reply, bytes):
                    raise TypeError
                done.append((task, reply))
                whole = records.tell()
        except (ValueError, TypeError, msgpack.UnpackException):
            raise DataError(f"{path}: not a history of this version; give the client another folder") from None
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return done
