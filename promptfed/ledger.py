"""One ledger for everything a run spends: calls, tokens, money, bytes and time, by phase and by client."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

from promptfed.types import FMResponse

Phase = Literal["tuning", "evaluation", "baselines"]
PHASES: tuple[Phase, ...] = ("tuning", "evaluation", "baselines")


@dataclass(slots=True, kw_only=True)
class Account:
    """What one client spent in one phase. Bytes are as serialised on the wire; up is client to server."""

    fm_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    failed_calls: int = 0
    truncated_calls: int = 0
    usd: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def add_answer(self, answer: FMResponse) -> None:
        self.fm_calls += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.cached_tokens += answer.cached_tokens
        self.failed_calls += answer.error is not None
        self.truncated_calls += answer.truncated
        self.usd += answer.usd


class Ledger:
    """Accounts by (phase, client). `phase` says which phase is on, and times it."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[Phase, str], Account] = defaultdict(Account)
        self._wall_s: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.phase: Phase = "tuning"

    def account(self, client_id: str) -> Account:
        """The account of a client in the phase that is on."""
        return self._accounts[self.phase, client_id]

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Book what happens inside under ``phase``."""
        before, self.phase, start = self.phase, phase, perf_counter()
        try:
            yield
        finally:
            self.phase = before
            self._wall_s[phase] += perf_counter() - start

    def total(self, phase: Phase) -> Account:
        """Sum over clients."""
        total = Account()
        for (booked, _), account in self._accounts.items():
            if booked == phase:
                for name, value in asdict(account).items():
                    setattr(total, name, getattr(total, name) + value)
        return total

    def as_dict(self) -> dict[str, Any]:
        """``{phase: {..., wall_s, by_client: {id: {...}}}}`` as in summary.json."""
        return {
            phase: {
                **asdict(self.total(phase)),
                "wall_s": round(self._wall_s[phase], 3),
                "by_client": {
                    client: asdict(account)
                    for (booked, client), account in sorted(self._accounts.items())
                    if booked == phase
                },
            }
            for phase in PHASES
        }
