"""A checkpoint a round: the replies as they came over the wire. They are the server's whole state.

A method is a pure function of the replies that it was sent (`promptfed.strategies.base`), so sending them again brings
it to where it was. Clients bring themselves there from their own folders (`clients.history`). Files are written aside
and renamed, so a round is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgpack

from promptfed.errors import DataError
from promptfed.files import write_whole


class Checkpoint:
    """Rounds in a folder, ``00001.msgpack`` and so on. Without a folder it keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, round_number: int, tasks: Mapping[str, bytes]) -> tuple[dict[str, bytes], float] | None:
        """The replies of a round and the seconds it took, if it was done. Raises `DataError` if it was done with other
        tasks."""
        path = self._path(round_number)
        if path is None or not path.exists():
            return None
        saved = msgpack.unpackb(path.read_bytes())
        if saved["tasks"] != dict(tasks):
            raise DataError(
                f"{path}: belongs to another configuration or version of promptfed; choose another folder or start "
                "anew with --force"
            )
        return saved["replies"], saved["seconds"]

    def save(self, round_number: int, tasks: Mapping[str, bytes], replies: Mapping[str, bytes], seconds: float) -> None:
        path = self._path(round_number)
        if path is None:
            return
        write_whole(path, msgpack.packb({"tasks": dict(tasks), "replies": dict(replies), "seconds": seconds}))

    def _path(self, round_number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{round_number:05d}.msgpack"
