"""Keeps SuperLink and the relay on it running: whatever of them ends is started again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from promptfed.errors import PromptfedError, RunError
from promptfed.federation.flower.link import Link
from promptfed.federation.flower.settings import Listen

RELAY_S = 90.0  # how long a submitted app may take to come up
TRIES = 5  # starts that fail in a row before giving up
AGAIN_S = 2.0

log = logging.getLogger("promptfed.flower")


class Upkeep:
    """``up`` is done when the first relay has connected, or failed when that did not come about.

    ``relay_changed`` is set by whoever serves the engine's socket when a relay connects or goes.
    """

    def __init__(self, listen: Listen, folder: Path, socket: Path, relay_changed: asyncio.Event) -> None:
        self._listen, self._folder, self._socket, self._relay_changed = listen, folder, socket, relay_changed
        self.up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.link: Link | None = None
        self.run_id = 0

    async def keep_up(self) -> None:
        """Until cancelled. A first start that fails is told through ``up``; raises RunError when later ones have failed
        several times in a row."""
        failures = 0
        while True:
            self.link = Link(self._listen, self._folder)
            try:
                await self.link.start()
                async for _ in self._relays(self.link):
                    failures = 0
                    if not self.up.done():
                        self.up.set_result(None)
                log.warning("SuperLink has ended; starting it again")
            except Exception as error:  # nobody awaits this: whoever waits for clients must hear of it
                told = error if isinstance(error, PromptfedError) else RunError(_why(error))
                if not self.up.done():
                    await self.link.stop()  # before anybody hears of it, and cancels us
                    self.up.set_exception(told)
                    return
                failures += 1
                log.warning("starting Flower again failed (%d of %d): %s", failures, TRIES, told)
                if failures >= TRIES:
                    raise told from error
                await asyncio.sleep(AGAIN_S)
            finally:
                await self.link.stop()

    async def _relays(self, link: Link) -> AsyncIterator[None]:
        """Submit the app, and again whenever its relay has gone, until SuperLink ends; yields once a relay is there."""
        dead = asyncio.create_task(link.died())
        try:
            while not dead.done():
                self._relay_changed.clear()
                self.run_id = await link.submit(self._socket)
                async with asyncio.timeout(RELAY_S):
                    await self._relay_changed.wait()
                yield
                self._relay_changed.clear()
                gone = asyncio.create_task(self._relay_changed.wait())
                await asyncio.wait({dead, gone}, return_when=asyncio.FIRST_COMPLETED)
                gone.cancel()
        finally:
            dead.cancel()


def _why(error: Exception) -> str:
    what = "the relay did not connect in time" if isinstance(error, TimeoutError) else type(error).__name__
    return f"Flower could not be started: {what}; the logs are in the run's folder"
