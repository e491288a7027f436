"""A folder that holds one generation of files, replaced as a whole.

    FOLDER/current                    the name of the generation that counts
    FOLDER/generation-000007-TOKEN/   its files

A new generation is written aside, brought to the disk, and counts from the moment that ``current`` is replaced; the one
before it is deleted after that. So a process that is killed anywhere leaves the old or the new, never between, and what
was deleted from an index is gone from the disk with the next save.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from promptfed.errors import DataError
from promptfed.files import write_whole

_NAME = re.compile(r"generation-(\d{6,})-[0-9a-f]{16}")


def current(folder: Path) -> Path:
    """The generation that counts. Raises `DataError` where there is none."""
    while True:
        name = _name(folder)
        if (folder / name).is_dir():
            return folder / name
        if _name(folder) == name:  # or it was replaced between the reading of its name and now
            raise DataError(f"{folder}: its file 'current' names no generation that is there; restore it from a copy")


def replace(folder: Path, before: str | None, fill: Callable[[Path], None]) -> str:
    """Write a new generation with ``fill`` and make it count; returns its name, which no other generation has.

    ``before`` is the name of the generation that it grew from, None for a new index. Raises `DataError`, and writes
    nothing, where another one counts by now, or where the folder holds generations and no word which one counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        now = current(folder).name if (folder / "current").exists() else None
        kept = sorted(path.name for path in folder.glob("generation-*") if _NAME.fullmatch(path.name))
        if now is None and kept:
            raise DataError(
                f"{folder}: holds {kept[-1]} and no file 'current' that says whether it counts. If it does, write its "
                "name into 'current'; if it was never finished, remove it"
            )
        if now != before:
            had = "an index that this one did not grow from" if before is None else f"not {before} any more"
            raise DataError(f"{folder}: holds {had}; open it anew, or choose another folder")
        match = _NAME.fullmatch(now) if now else None
        number = int(match[1]) + 1 if match else 1
        name = f"generation-{number:06d}-{secrets.token_hex(8)}"
        aside = folder / f"{name}.tmp"
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


def _name(folder: Path) -> str:
    try:
        name = (folder / "current").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise DataError(f"{folder}: no index; make one with promptfed index add") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder}: no index can be read here ({type(error).__name__})") from None
    if not _NAME.fullmatch(name):
        raise DataError(f"{folder}: its file 'current' names no generation; restore it from a copy")
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
