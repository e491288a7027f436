"""Writing files so that a process that is killed leaves the old file or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write aside, then rename. Text is UTF-8."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.write(content.encode("utf-8", errors="replace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def append_whole(path: Path, content: bytes) -> None:
    """Append to a file that its owner alone may read. What a full disk lets through in part is taken back, so that what
    is appended later does not run into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(file).st_size
        try:
            left = memoryview(content)
            while left:  # one system call, unless the disk is full or there is much
                left = left[os.write(file, left) :]
        except BaseException:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def cut_back(path: Path) -> None:
    """Drop what follows the end of the last whole line, so that the next line written does not run into it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
