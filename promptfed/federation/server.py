"""The round engine: sends a method's tasks to the clients, hands it the replies, keeps the books.

The server knows clients by the `Transport` that reaches them and never imports their code. It makes no FM call: what
is written or scored is written or scored at a client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from promptfed.errors import BudgetError, RunError, WireError
from promptfed.federation.checkpoint import Checkpoint
from promptfed.federation.events import EventLog
from promptfed.ledger import Ledger, Phase
from promptfed.messages import Failed, Reply, Task, decode_reply, encode
from promptfed.strategies.base import Round, Steps, T


class Transport(Protocol):
    """Carries encoded tasks to clients and brings encoded replies back, by client id. A client that did not answer
    is missing from the result."""

    async def exchange(self, tasks: Mapping[str, bytes]) -> dict[str, bytes]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What tuning may spend beside FM calls. None: no limit."""

    max_tokens: int | None = None
    max_usd: float | None = None


class Server:
    """One federation's server. Rounds are numbered through all phases of a run."""

    def __init__(
        self,
        transport: Transport,
        ledger: Ledger,
        events: EventLog,
        checkpoint: Checkpoint | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._transport, self._ledger, self._events = transport, ledger, events
        self._checkpoint = checkpoint or Checkpoint(None)
        self._limits = limits or Limits()
        self.round = 0
        self._since = 0.0

    async def drive(self, steps: Steps[T], phase: Phase, max_fm_calls: int) -> T:
        """Run a method to its end. No round is sent whose grants would pass ``max_fm_calls``."""
        granted, self._since = 0, perf_counter()
        with self._ledger.during(phase):
            try:
                round_ = next(steps)
                while True:
                    wanted = sum(round_.grants.values())
                    if granted + wanted > max_fm_calls:
                        left = f"{max_fm_calls - granted} of {max_fm_calls} are left"
                        raise BudgetError(f"round {round_.name!r} wants {wanted} FM calls; {left}")
                    self._check_limits(phase, wanted)
                    replies, spent = await self._exchange(round_, phase)
                    granted += spent
                    round_ = steps.send(replies)
            except StopIteration as done:
                result: T = done.value
                return result

    def _check_limits(self, phase: Phase, wanted: int) -> None:
        """Raise before a round that, at the mean price of the calls so far, would pass a limit of tuning."""
        spent = self._ledger.total(phase)
        if phase != "tuning" or not spent.fm_calls or not wanted:
            return
        scale = 1 + wanted / spent.fm_calls
        tokens, usd = (spent.prompt_tokens + spent.completion_tokens) * scale, spent.usd * scale
        for key, ahead, most in (
            ("max_tokens", tokens, self._limits.max_tokens),
            ("max_usd", usd, self._limits.max_usd),
        ):
            if most is not None and ahead > most:
                raise BudgetError(
                    f"the next round would bring tuning to about {ahead:.6g}, over budget.{key} = {most:g}; it was not "
                    f"started. Raise budget.{key} or lower budget.max_fm_calls"
                )

    async def _exchange(self, round_: Round, phase: Phase) -> tuple[dict[str, Reply], int]:
        """One round: encode, send, book, decode. Failed and malformed replies are logged and left out.

        Returns the replies and the FM calls made: as the clients say, or the whole grant of one that does not say.
        """
        self.round += 1
        tasks = {
            client: encode(
                Task(round=self.round, client_id=client, phase=phase, grant=round_.grants.get(client, 0), body=body)
            )
            for client, body in sorted(round_.tasks.items())
        }
        if (saved := self._checkpoint.load(self.round, tasks)) is not None:
            replies, seconds = saved
        else:
            replies = await self._transport.exchange(tasks)
            seconds = perf_counter() - self._since  # with what the method took to get here
            self._checkpoint.save(self.round, tasks, replies, seconds)
        self._since = perf_counter()
        self._ledger.add_seconds(seconds)
        decoded: dict[str, Reply] = {}
        failures: dict[str, str] = {}
        spent = 0
        for client, sent in tasks.items():
            grant = round_.grants.get(client, 0)
            account = self._ledger.account(client)
            account.bytes_down += len(sent)
            data = replies.get(client)
            account.bytes_up += len(data or b"")
            reply = self._reply(data, client, grant)
            spent += reply.usage.fm_calls if isinstance(reply, Reply) else grant
            if isinstance(reply, Reply):
                account.add(reply.usage)
            if not isinstance(reply, Reply):
                failures[client] = reply
            elif isinstance(reply.body, Failed):
                failures[client] = reply.body.reason
            else:
                decoded[client] = reply
        self._events.add(
            "round",
            {
                "round": self.round,
                "phase": phase,
                "name": round_.name,
                "n_clients": len(tasks),
                "fm_calls": spent,
                "tokens": self._ledger.total(phase).prompt_tokens + self._ledger.total(phase).completion_tokens,
                "bytes_up": sum(map(len, replies.values())),
                "bytes_down": sum(map(len, tasks.values())),
                "failures": failures,
            },
        )
        if not decoded:
            reasons = ", ".join(sorted(set(failures.values())))
            raise RunError(f"round {self.round} ({round_.name}): none of {len(tasks)} clients answered ({reasons})")
        return decoded, spent

    def _reply(self, data: bytes | None, client: str, grant: int) -> Reply | str:
        """The reply, or what is wrong with it."""
        if data is None:
            return "no answer"
        try:
            reply = decode_reply(data)
        except WireError:
            return "malformed"
        # A reply to an undecodable task names no round and spent nothing.
        named = reply.client_id == client and reply.round in (self.round, 0)
        return reply if named and reply.usage.fm_calls <= grant else "malformed"
