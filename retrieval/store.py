"""A folder that holds one generation of files, replaced as a whole.

    FOLDER/current               the name of the generation that counts
    FOLDER/generation-000007/    its files

A new generation is written aside, brought to the disk, and counts from the moment that ``current`` is replaced; the one
before it is deleted after that. So a process that is killed anywhere leaves the old or the new, never between, and what
was deleted from an index is gone from the disk with the next save.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from promptfed.errors import DataError
from promptfed.files import write_whole

_NAME = re.compile(r"generation-\d{6,}")


def current(folder: Path) -> Path:
    """The generation that counts. Raises `DataError` where there is none."""
    try:
        name = (folder / "current").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise DataError(f"{folder}: no index; make one with promptfed index add") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder}: no index can be read here ({type(error).__name__})") from None
    if not _NAME.fullmatch(name) or not (folder / name).is_dir():
        raise DataError(f"{folder}: its file 'current' names no generation that is there; restore it from a copy")
    return folder / name


def replace(folder: Path, before: str | None, fill: Callable[[Path], None]) -> str:
    """Write a new generation with ``fill`` and make it count; returns its name.

    ``before`` is the name of the generation that it grew from, None for a new index. Raises `DataError`, and writes
    nothing, where another one counts by now: somebody else saved meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        now = current(folder).name if (folder / "current").exists() else None
        if now != before:
            raise DataError(f"{folder}: changed since it was opened ({before or 'no index'}, now {now}); open it anew")
        number = int(now.removeprefix("generation-")) + 1 if now else 1
        name = f"generation-{number:06d}"
        aside = folder / f"{name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(folder / name, ignore_errors=True)  # of a process that was killed before it counted
        aside.mkdir()
        fill(aside)
        for path in [*aside.iterdir(), aside]:
            _to_disk(path)
        aside.rename(folder / name)
        _to_disk(folder)
        write_whole(folder / "current", name + "\n")
        _to_disk(folder)
        for path in folder.glob("generation-*"):
            if path.name != name:
                shutil.rmtree(path, ignore_errors=True)
    return name


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process saves at a time."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
