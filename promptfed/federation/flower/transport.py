"""The server's transport over Flower: tasks go to nodes as messages, replies come back as bytes.

The engine that uses it holds the whole state of a run, and Flower none: SuperLink, the relay that runs in it, and any
node may die and come back in the middle of an exchange, which then goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from promptfed.errors import PromptfedError, QuorumError, RunError
from promptfed.federation.flower import processes
from promptfed.federation.flower.answers import PROTOCOL
from promptfed.federation.flower.app.promptfed_relay.frames import Frame, pack, read
from promptfed.federation.flower.settings import Attached, Listen, client_keys
from promptfed.federation.flower.upkeep import Upkeep

AGAIN_S = 2.0

log = logging.getLogger("promptfed.flower")


@dataclass(slots=True)
class _Exchange:
    tasks: dict[str, bytes]
    answers: dict[str, bytes] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)  # with an answer, or with word that there will be none


@dataclass(frozen=True, slots=True)
class _Order:
    """One message that is under way: a task of a client, or a node's greeting (client is None)."""

    node: int
    client: str | None


class FlowerTransport:
    """Reaches clients as Flower's nodes. An async context manager: inside, SuperLink runs.

    A client is known once its node has answered a greeting with its id; with keys, the id must be the one that the
    node's key is registered for. A client that has answered without a result (its handler failed) is not waited for. A
    task whose node comes back, or whose message Flower lost, is sent again: clients answer a task they know with the
    same bytes.
    """

    def __init__(self, listen: Listen | Attached, folder: Path) -> None:
        processes.check_flower()
        self._listen, self._folder = listen, folder
        self._upkeep: Upkeep | None = None
        self._owners = client_keys(listen.clients)  # by public key
        self._seen: dict[int, tuple[str, str]] = {}  # of nodes that are online: when last activated, and the key
        self._nodes: dict[str, int] = {}  # where each client is, as far as it is reachable
        self._numbers = itertools.count(1)
        self._orders: dict[int, _Order] = {}
        self._exchange: _Exchange | None = None
        self._relay: asyncio.StreamWriter | None = None
        self._relay_changed = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: PromptfedError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._served: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self.late = 0  # replies that nobody waited for any more
        self.bytes_down = self.bytes_up = self.messages_down = self.messages_up = 0  # of tasks and replies, no envelope

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        socket = self.socket = processes.socket_path(self._folder, "engine.sock")
        socket.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._on_relay, socket)
        socket.chmod(0o600)
        if isinstance(self._listen, Attached):
            return self
        self._upkeep = Upkeep(self._listen, self._folder, socket, self._relay_changed)
        self._spawn(self._keep_up(self._upkeep))
        try:
            await self._upkeep.up
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._relay is not None:
            self._relay.close()
        await asyncio.gather(*self._served, return_exceptions=True)
        if self._server is not None:
            self._server.close()

    @property
    def clients(self) -> set[str]:
        """Those that are reachable now."""
        return set(self._nodes)

    async def wait_for_clients(self, wanted: int | Collection[str], timeout_s: float | None = None) -> set[str]:
        """Wait until so many clients, or these, are reachable; returns those that are. Raises QuorumError after
        ``timeout_s``."""
        names = set() if isinstance(wanted, int) else set(wanted)
        n = wanted if isinstance(wanted, int) else len(names)
        try:
            async with asyncio.timeout(timeout_s):
                while len(self._nodes) < n or not names <= set(self._nodes):
                    await self._next_change()
        except TimeoutError:
            missing = f"; missing: {', '.join(sorted(names - set(self._nodes)))}" if names else ""
            raise QuorumError(f"{len(self._nodes)} of {n} clients came within {timeout_s:g} s{missing}") from None
        return self.clients

    async def exchange(
        self, tasks: Mapping[str, bytes], awaited: Collection[str], deadline_s: float | None
    ) -> dict[str, bytes]:
        """As `Transport` says. Raises RunError when Flower can't be brought up again."""
        if self._exchange is not None:
            raise RuntimeError("one exchange at a time")
        now = self._exchange = _Exchange(dict(tasks))
        try:
            for client in sorted(tasks):
                self._give(client)
            async with asyncio.timeout(deadline_s):
                while not set(awaited) <= now.done:
                    await self._next_change()
        except TimeoutError:
            pass
        finally:
            self._exchange = None
            self._forget([number for number, order in self._orders.items() if order.client is not None])
        return {client: now.answers[client] for client in sorted(now.answers)}

    async def traffic(self) -> tuple[int, int]:
        """Bytes that Flower itself counts for the present app, with its envelope and greetings: up, down."""
        if self._upkeep is None or self._upkeep.link is None:
            raise RunError("this server runs no SuperLink of its own; ask that one (flwr list)")
        return await self._upkeep.link.traffic(self._upkeep.run_id)

    async def _keep_up(self, upkeep: Upkeep) -> None:
        try:
            await upkeep.keep_up()
        except PromptfedError as error:
            self._failure = error
            self._changed.set()

    async def _next_change(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._changed.clear()
        await self._changed.wait()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _on_relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the relay of the present app; an earlier one, should it still be there, is cut off."""
        if (me := asyncio.current_task()) is not None:
            self._served.add(me)
            me.add_done_callback(self._served.discard)
        if self._relay is not None:
            self._relay.close()
        self._relay = writer
        self._seen, self._nodes, self._orders = {}, {}, {}
        self._relay_changed.set()
        try:
            while (frame := await read(reader)) is not None and self._relay is writer:
                if frame.kind == "nodes":
                    self._on_nodes(frame.fields["nodes"])
                elif frame.kind == "reply":
                    self._on_reply(frame)
        finally:
            writer.close()
            if self._relay is writer:
                self._relay, self._nodes = None, {}
                self._relay_changed.set()

    def _on_nodes(self, nodes: list[tuple[int, bool, str, str]]) -> None:
        """Greet the nodes that have come, or come back; forget those that have gone."""
        online = {node: (activated, key) for node, is_online, activated, key in nodes if is_online}
        self._nodes = {client: node for client, node in self._nodes.items() if node in online}
        for node, seen in online.items():
            if self._seen.get(node) != seen:
                self._post(_Order(node, None), "hello", b"")
        self._seen = online

    def _on_reply(self, frame: Frame) -> None:
        order = self._orders.pop(frame.fields["ticket"], None)
        if order is None:
            self.late += 1
        elif order.client is None:
            self._on_hello(order.node, frame)
        elif frame.fields["status"] == "lost":
            self._nodes.pop(order.client, None)
            self._spawn(self._greet_again(order.node))
        elif self._exchange is not None:
            if frame.fields["status"] == "ok":
                self._exchange.answers[order.client] = frame.body
                self.bytes_up += len(frame.body)
            self.messages_up += 1
            self._exchange.done.add(order.client)
            self._changed.set()

    def _on_hello(self, node: int, frame: Frame) -> None:
        """A node has said who it is: believe it where it may be that, and give it what waits for it."""
        if node not in self._seen:  # gone meanwhile, and with it its key: it is greeted again when it comes back
            return
        if frame.fields["status"] != "ok":
            self._spawn(self._greet_again(node))
            return
        try:
            hello = json.loads(frame.body)
            client, protocol = str(hello["client"]), hello["protocol"]
        except (ValueError, KeyError, TypeError, RecursionError):
            client, protocol = "", None
        if protocol != PROTOCOL:
            log.warning("node %d speaks another protocol; it takes no part", node)
        elif not self._listen.insecure and self._owner(node) != client:
            log.warning(
                "node %d has the key of %s and calls itself otherwise; it takes no part", node, self._owner(node)
            )
            self._tell(Frame("send", {"ticket": next(self._numbers), "node": node, "what": "turned_away"}))
        else:
            self._nodes[client] = node
            self._give(client)
            self._changed.set()

    def _owner(self, node: int) -> str | None:
        """Whose key a node has, one that is online."""
        return self._owners.get(self._seen[node][1])

    async def _greet_again(self, node: int) -> None:
        await asyncio.sleep(AGAIN_S)
        if node in self._seen:
            self._post(_Order(node, None), "hello", b"")

    def _give(self, client: str) -> None:
        """Send a client its task of the present exchange, if there is one that it has not answered."""
        now, node = self._exchange, self._nodes.get(client)
        if now is None or node is None or client not in now.tasks or client in now.done:
            return
        self._forget([number for number, order in self._orders.items() if order.client == client])
        self._post(_Order(node, client), "task", now.tasks[client])
        self.bytes_down += len(now.tasks[client])
        self.messages_down += 1

    def _post(self, order: _Order, what: str, body: bytes) -> None:
        number = next(self._numbers)
        self._orders[number] = order
        self._tell(Frame("send", {"ticket": number, "node": order.node, "what": what}, body))

    def _forget(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._orders[number]
        if numbers:
            self._tell(Frame("forget", {"tickets": numbers}))

    def _tell(self, frame: Frame) -> None:
        if self._relay is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._relay.write(pack(frame))
