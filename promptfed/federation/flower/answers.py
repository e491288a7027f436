"""What a client says to a frame from the server, whatever carries it."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

from promptfed.federation.flower.app.promptfed_relay.frames import Frame

PROTOCOL = 1  # of the frames; a client with another takes no part

Handle = Callable[[bytes], Awaitable[bytes]]
log = logging.getLogger("promptfed.flower")


class Answers:
    """Greets with the client's id, and hands tasks to its handler."""

    def __init__(self, handle: Handle, client_id: str) -> None:
        self._handle, self._client_id = handle, client_id
        self.otherwise = (
            f"the server knows this key, but not as {client_id!r}: start with --id as its table of clients has it"
        )

    async def to(self, frame: Frame) -> Frame:
        """The answer. A handler that raises has failed: the server hears no more, the log only the exception's name."""
        if frame.kind == "turned_away":
            return Frame("reply", {"status": "ok"})
        if frame.kind == "hello":
            body = json.dumps({"client": self._client_id, "protocol": PROTOCOL}).encode()
            return Frame("reply", {"status": "ok"}, body)
        try:
            return Frame("reply", {"status": "ok"}, await self._handle(frame.body))
        except Exception as error:  # noqa: BLE001 nothing that a handler raises may end the node
            log.error("a task failed: %s", type(error).__name__)
            return Frame("reply", {"status": "failed"})
