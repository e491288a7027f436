"""A folder that holds one generation of files, replaced as a whole.

    FOLDER/current                    the name of the generation that counts
    FOLDER/generation-000007-TOKEN/   its files

A new generation is written aside, brought to the disk, and counts from the moment that ``current`` is replaced; the one
before it is deleted after that. So a process that is killed anywhere leaves the old or the new, never between, and
what was deleted from an index is gone from the disk with the next save.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from promptfed.errors import DataError
from promptfed.files import write_whole

# Seconds to wait for another process that saves.
PATIENCE_S = 60.0
_NAME = re.compile(r"generation-(\d{6,})-[0-9a-f]{16}")


class BusyError(DataError):
    """Somebody else is saving."""


def current(folder: Path) -> Path:
    """The generation that counts. Raises `DataError` where there is none."""
    while True:
        name = _name(folder)
        if (folder / name).is_dir():
            return folder / name
        if _name(folder) == name:  # or it was replaced between the reading of its name and now
            raise DataError(f"{folder}: its file 'current' names no generation that is there; restore it from a copy")


def replace(folder: Path, before: str | None, fill: Callable[[Path], None]) -> tuple[str, DataError | None]:
    """Write a new generation with ``fill``, make it count, and remove all others. Returns its name, which no other
    generation has, and what is wrong where one of the others could not be removed.

    ``before`` is the name of the generation that it grew from, None for a new index. Raises `DataError`, and writes
    nothing, where another one counts by now, or where the folder holds generations and no word which one counts.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: can't be made ({error.strerror})") from None
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
        try:
            aside.mkdir()
            fill(aside)
            for path in [*aside.iterdir(), aside]:
                _to_disk(path)
            aside.rename(folder / name)
            _to_disk(folder)
            write_whole(folder / "current", name + "\n")
        except BaseException as error:
            counts = (folder / "current").exists() and _name(folder) == name  # stopped after it had been replaced
            for path in (aside, *(() if counts else (folder / name,))):  # what is left of it, the next sweep sees to
                shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                state = "open it anew" if counts else "it is as it was"
                raise DataError(f"{folder}: can't be written ({error.strerror}); {state}") from None
            raise
        _to_disk(folder)
        return name, _remove_others(folder, name)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left beside the generation that counts, unless somebody is saving, who
    does the same. Raises `DataError` for what can't be removed."""
    if not (folder / "current").exists():
        return
    try:
        with _alone(folder, patience_s=0.0):
            if wrong := _remove_others(folder, current(folder).name):
                raise wrong
    except BusyError:
        return


def _remove_others(folder: Path, name: str) -> DataError | None:
    for path in folder.glob("generation-*"):
        if path.name != name:
            try:
                shutil.rmtree(path)
            except OSError as error:
                return DataError(
                    f"{path}: a former state of the index, which may hold what was deleted from it, can't be removed "
                    f"({error.strerror}); remove this folder"
                )
    return None


def _name(folder: Path) -> str:
    try:
        name = (folder / "current").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        if any(_NAME.fullmatch(path.name) for path in folder.glob("generation-*")):
            raise DataError(
                f"{folder}: an index whose first save was not finished, or that lost its file 'current'; "
                "see what promptfed index add says of it"
            ) from None
        raise DataError(f"{folder}: no index; make one with promptfed index add") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder}: no index can be read here ({type(error).__name__})") from None
    if not _NAME.fullmatch(name):
        raise DataError(f"{folder}: its file 'current' names no generation; restore it from a copy")
    return name


@contextmanager
def _alone(folder: Path, patience_s: float | None = None) -> Iterator[None]:
    """One process saves at a time. Raises `BusyError` where another still does after ``patience_s`` (`PATIENCE_S`)."""
    patience_s = PATIENCE_S if patience_s is None else patience_s
    end = time.monotonic() + patience_s
    try:
        file = (folder / "lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: can't be written ({error.strerror})") from None
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise BusyError(
                        f"{folder}: another process has been saving for {patience_s:g} s; try again when it is done"
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                raise DataError(f"{folder}: can't be locked ({error.strerror}); use another file system") from None
        yield


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
