"""A run in a process of its own that kills itself (SIGKILL) at its n-th durable write: before it, half way, or after.

    python -m tests.killable run CONFIG FOLDER [N before|half|after]
    python -m tests.killable resume FOLDER [N before|half|after]

Prints the number of durable writes and of calls that reached the foundation model, if it lives to its end. Calls that
were answered before a kill are appended to FOLDER/../calls.txt as they are made.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import promptfed
from clients import client, history
from promptfed import conduct
from promptfed import folder as run_folder
from promptfed.federation import checkpoint
from promptfed.fm import journal
from promptfed.fm.base import WrappedFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.prompts import artefact
from promptfed.types import FMRequest, FMResponse
from tests.support import WordEncoder


class Tally(WrappedFM):
    """The scripted model, which writes down every call before it answers."""

    def __init__(self, path: Path) -> None:
        super().__init__(ScriptedFM())
        self._path = path

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        with self._path.open("a") as file:
            file.write(f"{len(requests)}\n")
        return await self._inner.complete(requests)


class Killer:
    """Counts durable writes of all kinds, and kills this process at one of them."""

    def __init__(self, at: int, where: str) -> None:
        self.n, self._at, self._where = 0, at, where

    def due(self) -> bool:
        self.n += 1
        return self.n == self._at

    def whole(self, write: Callable[[Path, str | bytes], None]) -> Callable[[Path, str | bytes], None]:
        """`write_whole`: half way is a scratch file that was never renamed."""

        def wrapped(path: Path, content: str | bytes) -> None:
            due = self.due()
            if due and self._where == "half":
                path.with_name(path.name + ".tmp").write_bytes(b"half")
            if due and self._where != "after":
                die()
            write(path, content)
            if due:
                die()

        return wrapped

    def appending(self, write: Callable[..., None], path_of: Callable[[Any], Path | None]) -> Callable[..., None]:
        """An append: half way, the file ends in the middle of what was written."""

        def wrapped(self_: Any, *args: Any) -> None:
            path = path_of(self_)
            if path is None or not self.due():
                write(self_, *args)
                return
            before = path.stat().st_size if path.exists() else 0
            if self._where != "before":
                write(self_, *args)
            if self._where == "half":
                os.truncate(path, before + (path.stat().st_size - before) // 2)
            die()

        return wrapped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    verb, *rest = sys.argv[1:]
    config, folder = (rest.pop(0) if verb == "run" else ""), Path(rest.pop(0))
    killer = Killer(int(rest[0]) if rest else 0, rest[1] if rest else "before")
    for module in (run_folder, conduct, client, checkpoint, artefact):
        module.write_whole = killer.whole(module.write_whole)  # type: ignore[attr-defined]
    journal.append_whole = killer.appending(journal.append_whole, lambda path: path)  # type: ignore[attr-defined]
    history.TaskHistory.add = killer.appending(history.TaskHistory.add, lambda h: h._path)  # type: ignore[method-assign]
    log = conduct.EventLog
    log._append = killer.appending(log._append, lambda e: e._path)  # type: ignore[method-assign]

    fm = Tally(folder.parent / "calls.txt")
    if verb == "run":
        promptfed.run(config, out=folder, fm=fm, encoder=WordEncoder())
    else:
        promptfed.resume(folder, fm=fm, encoder=WordEncoder())
    print(killer.n)  # noqa: T201


if __name__ == "__main__":
    main()
