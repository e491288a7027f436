"""One ledger for everything a run spends: calls, tokens, money, bytes and time, by phase and by client."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from promptfed.types import FMResponse

Phase = Literal["tuning", "transfer", "evaluation", "baselines"]
PHASES: tuple[Phase, ...] = ("tuning", "transfer", "evaluation", "baselines")


Count = Annotated[int, Field(ge=0)]


@dataclass(slots=True, kw_only=True)
class Usage:
    """What was spent at the foundation model. Clients count it and say so with every reply."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012  (a message carries this)

    fm_calls: Count = 0
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    cached_tokens: Count = 0
    failed_calls: Count = 0
    truncated_calls: Count = 0
    censored_calls: Count = 0
    usd: Annotated[float, Field(ge=0)] = 0.0

    def add_answer(self, answer: FMResponse) -> None:
        self.fm_calls += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.cached_tokens += answer.cached_tokens
        self.failed_calls += answer.error is not None or not all(map(math.isfinite, answer.logprobs or ()))
        self.truncated_calls += answer.truncated
        self.censored_calls += answer.censored is not None
        self.usd += answer.usd

    def add(self, other: Usage) -> None:
        for f in fields(other):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(slots=True, kw_only=True)
class Account(Usage):
    """What one client spent in one phase. Bytes are as serialised on the wire; up is client to server."""

    bytes_up: int = 0
    bytes_down: int = 0


class Ledger:
    """Accounts by (phase, client), filled from the clients' replies; `during` says which phase is on.

    Seconds are booked a round, from the clock or from the checkpoint of a round that was done before.
    """

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
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def add_seconds(self, seconds: float) -> None:
        """Book wall time under the phase that is on."""
        self._wall_s[self.phase] += seconds

    def seconds(self, phase: Phase) -> float:
        """Wall time of a phase so far."""
        return self._wall_s[phase]

    def total(self, phase: Phase) -> Account:
        """Sum over clients."""
        total = Account()
        for (booked, _), account in self._accounts.items():
            if booked == phase:
                total.add(account)
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
            if phase != "transfer" or any(booked == phase for booked, _ in self._accounts)
        }
