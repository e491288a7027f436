"""The in-process transport: every client is an object here. A simulation: nothing leaves the machine but FM calls.

Tasks and replies are serialised all the same, so a client sees only what the codec carries and bytes are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol


class ClientProxy(Protocol):
    """A client as the transport sees it: bytes in, bytes out. It does not raise for a task that failed."""

    async def handle(self, task: bytes) -> bytes: ...


class InProcessTransport:
    """Runs all clients of a round concurrently in this event loop."""

    def __init__(self, clients: Mapping[str, ClientProxy]) -> None:
        self._clients = dict(clients)

    async def exchange(self, tasks: Mapping[str, bytes]) -> dict[str, bytes]:
        ids = sorted(tasks)
        replies = await asyncio.gather(*(self._clients[client].handle(tasks[client]) for client in ids))
        return dict(zip(ids, replies, strict=True))
