"""The ServerApp: carries frames between the engine's unix socket and Flower's Grid. It keeps no state of the run.

From the engine: `send` (ticket, node; the body is the content frame's body) and `forget` (tickets). To the engine:
`started` (run), `nodes` (all that SuperLink knows, when something changed), `reply` (ticket, status; body) with the
status `ok`, `failed` (the client's side says so) or `lost` (Flower says that no reply will come).
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from .frames import Frame, receive, send
from .pace import Pace
from .records import from_content, to_content

TTL_S = 7 * 24 * 3600.0  # a task may take long, and the engine has a deadline of its own
NODES_EVERY_S = 0.5
LEAVE_S = 15.0


class Relay:
    """One connection to the engine. All calls of the Grid are made in the thread that calls `run`."""

    def __init__(self, grid: Grid, engine: socket.socket) -> None:
        self._grid, self._engine = grid, engine
        self._inbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._tickets: dict[str, int] = {}  # by the id of the message that carries it
        self._nodes: list[list[Any]] = []

    def run(self) -> None:
        """Relay until the engine closes its end."""
        threading.Thread(target=self._listen, daemon=True).start()
        pace, nodes_at = Pace(), 0.0
        while True:
            frames = self._waiting(pace.pause())
            if None in frames:
                return
            if self._push([f for f in frames if f is not None]) + self._pull():
                pace.happened()
            if time.monotonic() >= nodes_at:
                self._look_at_nodes()
                nodes_at = time.monotonic() + NODES_EVERY_S

    def _listen(self) -> None:
        try:
            while (frame := receive(self._engine)) is not None:
                self._inbox.put(frame)
        finally:
            self._inbox.put(None)
            time.sleep(LEAVE_S)
            os._exit(1)  # a call to a SuperLink that is gone is tried for ever: it would keep us

    def _waiting(self, timeout_s: float) -> list[Frame | None]:
        """What the engine has sent, waiting for a first frame at most this long."""
        frames: list[Frame | None] = []
        try:
            frames.append(self._inbox.get(timeout=timeout_s))
            while True:
                frames.append(self._inbox.get_nowait())
        except queue.Empty:
            return frames

    def _push(self, frames: list[Frame]) -> int:
        for frame in frames:
            if frame.kind == "forget":
                gone = set(frame.fields["tickets"])
                self._tickets = {m: t for m, t in self._tickets.items() if t not in gone}
        orders = [f for f in frames if f.kind == "send"]
        if not orders:
            return 0
        messages = [
            Message(to_content(Frame(f.fields["what"], {}, f.body)), f.fields["node"], "query.promptfed", ttl=TTL_S)
            for f in orders
        ]
        for frame, message_id in zip(orders, self._grid.push_messages(messages), strict=True):
            if message_id:
                self._tickets[message_id] = frame.fields["ticket"]
            else:  # SuperLink doesn't know the node, or not any more
                send(self._engine, Frame("reply", {"ticket": frame.fields["ticket"], "status": "lost"}))
        return len(orders)

    def _pull(self) -> int:
        if not self._tickets:
            return 0
        n = 0
        for message in self._grid.pull_messages(list(self._tickets)):
            ticket = self._tickets.pop(message.metadata.reply_to_message_id, None)
            if ticket is None:
                continue
            n += 1
            status, body = "lost", b""
            if not message.has_error():
                try:
                    reply = from_content(message.content)
                    status, body = "ok" if reply.fields["status"] == "ok" else "failed", reply.body
                except Exception:  # noqa: BLE001  (whatever one node sends, the others' messages go on)
                    status = "failed"
            send(self._engine, Frame("reply", {"ticket": ticket, "status": status}, body))
        return n

    def _look_at_nodes(self) -> None:
        nodes = sorted(
            [n.node_id, n.status == "online", n.last_activated_at, n.public_key.decode("ascii", "replace")]
            for n in self._grid.get_nodes()
        )
        if nodes != self._nodes:
            self._nodes = nodes
            send(self._engine, Frame("nodes", {"nodes": nodes}))


def main(grid: Grid, context: Context) -> None:
    """Connect to the engine's socket, which the run's configuration names, and relay until it is closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as engine:
        engine.connect(str(context.run_config["engine"]))
        send(engine, Frame("started", {"run": str(grid.run.run_id)}))
        Relay(grid, engine).run()


app = ServerApp()
app.main()(main)
