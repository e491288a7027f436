"""The in-process transport: every client is an object here. A simulation: nothing leaves the machine but FM calls.

Tasks and replies are serialised all the same, so a client sees only what the codec carries and bytes are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Protocol


class ClientProxy(Protocol):
    """A client as the transport sees it: bytes in, bytes out. It does not raise for a task that failed."""

    async def handle(self, task: bytes) -> bytes: ...


class InProcessTransport:
    """Runs all clients of a round concurrently in this event loop.

    A client that is late goes on with its task; what it then replies is dropped, and the next task waits for it. One
    that raises has not answered. ``restore`` is awaited before the first round that is really sent: it brings clients
    to where an earlier process left them, outside any deadline.
    """

    def __init__(
        self, clients: Mapping[str, ClientProxy], restore: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._clients = dict(clients)
        self._restore = restore
        self._busy: dict[str, asyncio.Task[bytes]] = {}

    async def exchange(
        self, tasks: Mapping[str, bytes], awaited: Collection[str], deadline_s: float | None
    ) -> dict[str, bytes]:
        if self._restore is not None:
            await self._restore()
            self._restore = None
        for client in sorted(tasks):
            self._busy[client] = asyncio.create_task(self._deliver(client, tasks[client], self._busy.get(client)))
        mine = {client: self._busy[client] for client in sorted(tasks)}
        missing = {mine[client] for client in awaited}
        loop = asyncio.get_running_loop()
        end = None if deadline_s is None else loop.time() + deadline_s
        while missing and (end is None or loop.time() < end):
            left = None if end is None else max(0.0, end - loop.time())
            _, missing = await asyncio.wait(missing, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        answered = {c: t for c, t in mine.items() if t.done() and not t.cancelled() and t.exception() is None}
        return {client: t.result() for client, t in answered.items()}

    async def _deliver(self, client: str, task: bytes, before: asyncio.Task[bytes] | None) -> bytes:
        if before is not None and not before.done():
            await asyncio.wait({before})
        return await self._clients[client].handle(task)
