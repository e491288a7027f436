"""A client behind a SuperNode that somebody else runs: only the unix socket at which its ClientApp asks.

The SuperNode is told where, and installs and runs the app that the server submits:

    flower-supernode --superlink HOST:PORT --root-certificates CA --auth-supernode-private-key KEY \\
        --node-config 'daemon="FOLDER/daemon.sock"'
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from promptfed.federation.flower.answers import Answers, Handle
from promptfed.federation.flower.app.promptfed_relay.frames import pack, read
from promptfed.federation.flower.processes import socket_path

log = logging.getLogger("promptfed.flower")


async def serve_socket(handle: Handle, *, client_id: str, folder: Path) -> None:
    """Answer what comes to ``folder/daemon.sock`` with ``handle`` until cancelled; one task at a time.

    Raises OSError when the socket can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answers, one = Answers(handle, client_id), asyncio.Lock()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if (frame := await read(reader)) is not None:
                async with one:
                    answer = await answers.to(frame)
                if frame.kind == "turned_away":
                    log.error(answers.otherwise)
                writer.write(pack(answer))
                with contextlib.suppress(ConnectionError):  # the SuperNode has ended meanwhile
                    await writer.drain()
        finally:
            writer.close()

    path = socket_path(folder, "daemon.sock")
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(serve, path)
    path.chmod(0o600)
    log.info("waiting at %s", path)
    async with server:
        await server.serve_forever()
