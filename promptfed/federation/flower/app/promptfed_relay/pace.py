"""How often to ask whether there is something to do."""

from __future__ import annotations

import time


class Pace:
    """Pauses that are a share of the time in which nothing has happened, within bounds.

    So asking adds at most that share to a wait, and costs little in a long one.
    """

    def __init__(self, least_s: float = 0.05, most_s: float = 1.0, share: float = 0.05) -> None:
        self._least, self._most, self._share = least_s, most_s, share
        self._since = time.monotonic()

    def happened(self) -> None:
        """Something did: the next pause is the least one."""
        self._since = time.monotonic()

    def pause(self) -> float:
        """Seconds until one should ask again."""
        return min(self._most, max(self._least, self._share * (time.monotonic() - self._since)))
