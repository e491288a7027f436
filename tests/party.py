"""A client of a federation over a network, as a process of its own, without weights.

    python -m tests.party '{"client_id": ..., "train": FILE, "test": FILE, "folder": ..., "server": ..., ...}'

``slow_s``: seconds that it takes for each task. ``calls``: a file to which the size of every batch is appended that
reaches its foundation model. ``index``: a folder with an index that others may search, and ``share`` what they see.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

from clients.data import read_rows
from clients.host import ClientHost
from promptfed.federation.flower.node import serve_node
from retrieval.index import LocalIndex
from retrieval.owner import IndexOwner, Policy
from tests.killable import Tally
from tests.support import WordEncoder


def main(options: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO)
    client_id, slow_s = options.pop("client_id"), options.pop("slow_s", 0.0)
    folder = Path(options.pop("folder"))

    def rows(path: str) -> list[tuple[str, str, str]]:
        return read_rows(Path(path), client_column="", text_column="text", label_column="label", client=client_id)

    owner = None
    if index := options.pop("index", None):
        policy = Policy(shares=options.pop("share"))
        owner = IndexOwner(client_id, LocalIndex.open(Path(index), WordEncoder()), policy, folder=folder / "index")
    fm = Tally(Path(options.pop("calls")))
    host = ClientHost(
        client_id, rows(options.pop("train")), rows(options.pop("test")), fm, WordEncoder(), folder, owner
    )

    async def handle(task: bytes) -> bytes:
        await asyncio.sleep(slow_s)
        return await host.handle(task)

    for name in ("root_certificates", "private_key"):
        options[name] = Path(options[name]) if options.get(name) else None
    asyncio.run(serve_node(handle, client_id=client_id, folder=folder / "flower", **options))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
