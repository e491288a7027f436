"""Saves an index in children that kill themselves (SIGKILL) at their first, second, ... step on the file system.

    python -m tests.killable_index FOLDER

FOLDER holds an index of `BEFORE` when each begins, and each is to save one of `AFTER`. Prints a line a child: the
documents that the folder holds when it is dead, and when another process has saved after it; or the error.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from promptfed.errors import DataError
from retrieval.documents import Document
from retrieval.index import LocalIndex
from tests.support import WordEncoder

BEFORE = {"a": "the first document", "b": "the second document"}
AFTER = {"b": "the second document, changed", "c": "the third document"}
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def documents(texts: dict[str, str]) -> list[Document]:
    return [Document(doc_id=doc_id, text=text) for doc_id, text in texts.items()]


def save_the_other(folder: Path, kill_at: int | None) -> None:
    index = LocalIndex.open(folder, WordEncoder())
    index.delete(["a"])
    index.add(documents(AFTER))
    n = 0

    def count(event: str, args: tuple[object, ...]) -> None:
        nonlocal n
        if event in STEPS and any(str(folder) in str(arg) for arg in args):
            n += 1
            if n == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    index.save(folder)


def state(folder: Path) -> str:
    try:
        index = LocalIndex.open(folder, WordEncoder())
        texts = {doc_id: " ".join(index.passages(doc_id)) for doc_id in index.doc_ids}
        for doc_id, text in texts.items():
            assert index.search([text], 1)[0][0].doc_id == doc_id
    except (DataError, AssertionError) as error:
        return f"broken: {error}"
    return {str(BEFORE): "before", str(AFTER): "after"}.get(str(texts), str(texts))


def main() -> None:
    start, folder = Path(sys.argv[1]), Path(sys.argv[1]).with_name("killed")
    index = LocalIndex(WordEncoder())
    index.add(documents(BEFORE))
    index.save(start)
    for kill_at in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        child = os.fork()
        if child == 0:
            save_the_other(folder, kill_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = state(folder)
        save_the_other(folder, None)
        left = sorted(path.name for path in folder.iterdir())
        print(found, state(folder), ",".join(left), flush=True)  # noqa: T201
        if os.WIFEXITED(status):
            return


if __name__ == "__main__":
    main()
