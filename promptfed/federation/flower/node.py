"""A client as a node of a Flower federation: keeps its SuperNode running and answers what comes through it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import time
from pathlib import Path

from promptfed.errors import ConfigError
from promptfed.federation.flower import processes
from promptfed.federation.flower.answers import Answers, Handle
from promptfed.federation.flower.app.promptfed_relay.frames import pack, read
from promptfed.federation.flower.settings import check_node_files, split_address

PATIENCE_S = 70.0  # SuperLink takes a node that was killed for online, and refuses a second, for up to a minute
LEAVE_S = 3.0
AGAIN_S = (0.5, 5.0)  # between starts of the SuperNode: the first pause, and the longest

log = logging.getLogger("promptfed.flower")


async def serve_node(
    handle: Handle,
    *,
    client_id: str,
    server: str,
    folder: Path,
    root_certificates: Path | None = None,
    private_key: Path | None = None,
    insecure: bool = False,
    patience_s: float = PATIENCE_S,
) -> None:
    """Answer the tasks of the server at ``server`` (HOST:PORT) with ``handle`` until cancelled, or until SIGTERM.

    Tasks come one at a time. A server that can't be reached is tried again, without end. When ``handle`` raises, the
    server is told that the task failed and no more. ``folder`` gets the SuperNode's log.

    Raises ConfigError for options that don't go together, for a certificate that ``root_certificates`` doesn't vouch
    for, when the server knows the key as another client's, and when a server that never knew this node has refused its
    key for ``patience_s``.
    """
    processes.check_flower()
    options = _options(server, root_certificates, private_key, insecure)
    folder.mkdir(parents=True, exist_ok=True)
    node = _Node(handle, client_id, options, folder, patience_s)
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(node.run())
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread: no signals there
        loop.add_signal_handler(signal.SIGTERM, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        if not work.cancelled():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            raise
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGTERM)


def _options(server: str, root: Path | None, key: Path | None, insecure: bool) -> dict[str, object]:
    split_address(server, "server")
    if insecure and (root or key):
        raise ConfigError("insecure goes with no certificates and no key; drop one or the other")
    if not insecure and key is None:
        raise ConfigError("a client needs its private key; for plain text on a machine of your own ask for insecure")
    check_node_files(key, root)
    return {
        "server": server,
        "insecure": insecure,
        "root_certificates": str(root.resolve()) if root else None,
        "key": str(key.resolve()) if key else None,
    }


class _Node:
    def __init__(
        self, handle: Handle, client_id: str, options: dict[str, object], folder: Path, patience_s: float
    ) -> None:
        self._answers, self._options, self._folder = Answers(handle, client_id), options, folder
        self._patience_s = patience_s
        self._accepted = False
        self._refused_since: float | None = None

    async def run(self) -> None:
        pause = AGAIN_S[0]
        while True:
            begun = time.monotonic()
            said = await self._one_process()
            if said == "untrusted":
                raise ConfigError(f"{self._options['server']}: its certificate is not vouched for by root_certificates")
            self._check_refused(said == "refused")
            pause = AGAIN_S[0] if time.monotonic() - begun > AGAIN_S[1] * 2 else min(pause * 2, AGAIN_S[1])
            if said == "unreachable":
                log.info("%s can't be reached; trying again", self._options["server"])
            else:
                log.info("the connection ended (%s); connecting again in %.1f s", said, pause)
            await asyncio.sleep(pause)

    def _check_refused(self, refused: bool) -> None:
        if not refused or self._accepted:
            self._refused_since = None
            return
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since >= self._patience_s:
            raise ConfigError(
                f"{self._options['server']} refuses this client: its table of clients does not hold this key, or "
                "another process is still running with it"
            )

    async def _one_process(self) -> str:
        """Run one SuperNode to its end; returns what it said last of the connection."""
        ours, theirs = socket.socketpair()
        process = None
        try:
            with theirs:
                options = json.dumps(self._options | {"fd": theirs.fileno(), "last_node": self._last_node()})
                process = await processes.start(
                    processes.module("fleet", options), self._folder, "supernode.log", [theirs.fileno()]
                )
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                return await self._serve(reader, writer)
            finally:
                writer.close()
        finally:
            ours.close()  # asks it to sign off and end
            if process is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), LEAVE_S)
            await processes.stop(process)

    def _last_node(self) -> int | None:
        """The id that SuperLink gave us last. It goes with the key, so it is still ours after a crash."""
        try:
            return int((self._folder / "node").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        said = "lost"
        while (frame := await read(reader)) is not None:
            if frame.kind in ("hello", "task", "turned_away"):
                writer.write(pack(await self._answers.to(frame)))
                with contextlib.suppress(ConnectionError):  # it ended meanwhile: the server will ask again
                    await writer.drain()
                if frame.kind == "turned_away":
                    raise ConfigError(self._answers.otherwise)
            else:
                said = frame.kind
                if said == "connected":
                    (self._folder / "node").write_text(f"{frame.fields['node']}\n", encoding="ascii")
                    self._accepted, said = True, "lost"
                    log.info("connected to %s", self._options["server"])
        return said
