"""The round engine: sends a method's tasks to the clients, hands it the replies, keeps the books.

The server knows clients by the `Transport` that reaches them and never imports their code. It makes no FM call: what
is written or scored is written or scored at a client.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

from promptfed.errors import BudgetError, QuorumError, WireError
from promptfed.federation.checkpoint import Checkpoint
from promptfed.federation.events import EventLog
from promptfed.ledger import Ledger, Phase
from promptfed.messages import Failed, Join, Joined, Reply, Task, decode_reply, encode
from promptfed.strategies.base import Round, Steps, T
from promptfed.types import Transport

# Rounds in a row that a client may have missed and still be waited for while it catches up.
CATCH_UP = 2
# Tokens that one call may have taken, retries and all labels together; far more than any does.
MAX_TOKENS = 10_000_000
# Bytes of a reply; the parameters of a LoRA domain model have 300 thousand.
MAX_REPLY = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What tuning may spend beside FM calls, how long a round may wait, and the share of the clients asked that must
    answer it. None: no limit."""

    max_tokens: int | None = None
    max_usd: float | None = None
    deadline_s: float | None = None
    quorum: float = 0.5

    def needed(self, n: int) -> int:
        """How many of ``n`` clients are a quorum."""
        return max(1, math.ceil(self.quorum * n - 1e-9))  # 0.7 of 10 is 7


class Server:
    """One federation's server. Rounds are numbered through all phases of a run.

    A client that did not answer a round is asked again in the next, but no round waits for it until it has answered
    one, unless it may catch up (`Round.again`): a partner that is gone costs two deadlines at most, not one a round.
    """

    def __init__(
        self,
        transport: Transport,
        ledger: Ledger,
        events: EventLog,
        checkpoint: Checkpoint | None = None,
        limits: Limits | None = None,
        *,
        run: str = "run",
        fleet: str = "tuning",
        sizes: dict[str, int] | None = None,
    ) -> None:
        """``sizes``: how many texts each client has, as it said when it joined; shared by the fleets of a run."""
        self._transport, self._ledger, self._events = transport, ledger, events
        self._checkpoint = checkpoint or Checkpoint(None)
        self._limits = limits or Limits()
        self._run, self._fleet = run, fleet
        self._sizes = {} if sizes is None else sizes
        self.round = 0
        self._since = 0.0
        self._missed: defaultdict[str, int] = defaultdict(int)  # rounds in a row that it was asked and did not answer
        self._absent: set[str] = set()  # whom no round waits for; unlike the above, no task tells of it
        self._booked: defaultdict[str, int] = defaultdict(int)  # FM calls that a client has told of
        self._booked_usd: defaultdict[str, float] = defaultdict(float)
        self._owed: defaultdict[str, int] = defaultdict(int)  # granted to it since it last replied
        self._owed_usd: defaultdict[str, float] = defaultdict(float)  # that it may have spent since then
        self._untold: defaultdict[str, int] = defaultdict(int)  # booked, and in no reply that a method was sent
        self._joiners: dict[str, Join] = {}
        self._welcome: Callable[[str, Joined], None] = lambda _client, _joined: None

    def invite(self, clients: Iterable[str], task: Join, welcome: Callable[[str, Joined], None]) -> None:
        """Ask ``clients`` to join, beside the tasks of every round, until they do. ``welcome`` is called after the
        round in which one did."""
        self._joiners, self._welcome = dict.fromkeys(clients, task), welcome

    def expect_absent(self, clients: Iterable[str]) -> None:
        """Don't let a round wait for ``clients`` until they have answered one."""
        self._absent = set(clients)

    async def drive(self, steps: Steps[T], phase: Phase, max_fm_calls: int) -> T:
        """Run a method to its end. No round is sent whose grants would pass ``max_fm_calls``."""
        before, self._since = self._spent, perf_counter()
        with self._ledger.during(phase):
            try:
                round_ = next(steps)
                while True:
                    wanted = sum(round_.grants.values())
                    left_calls = max_fm_calls - (self._spent - before)
                    if wanted > left_calls:
                        left = f"{left_calls} of {max_fm_calls} are left"
                        raise BudgetError(f"round {round_.name!r} wants {wanted} FM calls; {left}")
                    self._check_limits(phase, wanted)
                    round_ = steps.send(await self._exchange(round_, phase))
            except StopIteration as done:
                result: T = done.value
                return result

    @property
    def _spent(self) -> int:
        """FM calls made, and those that may have been: granted to clients that have not replied since."""
        return sum(self._booked.values()) + sum(self._owed.values())

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

    async def _exchange(self, round_: Round, phase: Phase) -> dict[str, Reply]:
        """One round: encode, send, book, decode. Failed and malformed replies are logged and left out.

        The usage in a reply is that of all tasks since the last reply that a method was sent.
        """
        self.round += 1
        # Only what is open may be granted again: whoever has replied, if with a failure, has had its calls booked.
        again = {c: n for c, n in round_.again.items() if n <= self._owed[c] and self._missed[c] <= CATCH_UP}
        for client, grant in round_.grants.items():
            self._owed[client] += grant
        grants = {c: round_.grants.get(c, 0) + again.get(c, 0) for c in {**self._joiners, **round_.tasks}}
        usd = self._share_money(grants)
        tasks = {
            client: encode(
                Task(
                    round=self.round,
                    client_id=client,
                    run=self._run,
                    fleet=self._fleet,
                    grant=grants[client],
                    limit=self._booked[client] + self._owed[client],
                    usd=usd.get(client),
                    body=body,
                )
            )
            for client, body in sorted({**self._joiners, **round_.tasks}.items())
        }
        saved = self._checkpoint.load(self.round, tasks)
        if saved is not None:
            replies, seconds = saved
        else:
            here = [c for c in round_.tasks if c not in self._absent]
            awaited = [c for c in here if not self._missed[c] or c in again] or list(round_.tasks)
            came = await self._transport.exchange(tasks, awaited, self._limits.deadline_s)
            # What is too large is malformed, and not kept: in memory a reply is some fifty times its bytes.
            replies = {client: data if len(data) <= MAX_REPLY else b"" for client, data in came.items()}
            seconds = perf_counter() - self._since  # with what the method took to get here
        answers = {client: self._reply(replies.get(client), client) for client in tasks}
        good = {c: a for c, a in answers.items() if isinstance(a, Reply) and not isinstance(a.body, Failed)}
        failures = {c: _reason(a) for c, a in answers.items() if c not in good and c in round_.tasks}
        if saved is None:
            if not round_.optional:
                self._check_quorum(round_, failures)
            self._checkpoint.save(self.round, tasks, replies, seconds)
        self._since = perf_counter()
        self._ledger.add_seconds(seconds)
        for client in tasks:
            if client in replies:
                self._missed[client] = 0
                self._absent.discard(client)
            elif client in round_.tasks:
                self._missed[client] += 1
        for client, answer in good.items():
            if isinstance(joined := answer.body, Joined):
                self._sizes.setdefault(client, max(joined.n_train, joined.n_test))
        spent = self._book(tasks, replies, answers)
        told = {c: self._whole(a) for c, a in good.items() if c in round_.tasks}
        total = self._ledger.total(phase)
        self._events.add(
            "round",
            {
                "round": self.round,
                "phase": phase,
                "name": round_.name,
                "n_clients": len(round_.tasks),
                "fm_calls": spent,
                "tokens": total.prompt_tokens + total.completion_tokens,
                "bytes_up": sum(map(len, replies.values())),
                "bytes_down": sum(map(len, tasks.values())),
                "failures": failures,
            },
        )
        for client in sorted(self._joiners.keys() & good.keys()):
            if isinstance(joined := good[client].body, Joined):
                del self._joiners[client]
                self._events.add("joined", {"round": self.round, "client": client})
                self._welcome(client, joined)
        return told

    @property
    def _max_usd(self) -> float | None:
        """What the phase that is on may spend."""
        return self._limits.max_usd if self._ledger.phase == "tuning" else None

    def _share_money(self, grants: Mapping[str, int]) -> dict[str, float]:
        """What each client may spend of the money that is left for tuning, by the calls that it was granted."""
        wanted = sum(grants.values())
        if self._max_usd is None or not wanted:
            return {}
        left = self._max_usd - self._ledger.total(self._ledger.phase).usd - sum(self._owed_usd.values())
        shares = {client: max(left, 0.0) * grant / wanted for client, grant in grants.items() if grant}
        for client, share in shares.items():
            self._owed_usd[client] += share
        return shares

    def _check_quorum(self, round_: Round, failures: Mapping[str, str]) -> None:
        n = len(round_.tasks)
        needed = self._limits.needed(n)
        if n - len(failures) < needed:
            reasons = ", ".join(f"{client}: {reason}" for client, reason in sorted(failures.items())[:5])
            raise QuorumError(
                f"round {self.round} ({round_.name}): {n - len(failures)} of {n} clients answered, rounds.quorum = "
                f"{self._limits.quorum:g} asks for {needed} ({reasons}{', ...' if len(failures) > 5 else ''}). Nothing "
                "is lost: mend them and go on with promptfed resume"
            )

    def _book(
        self,
        tasks: Mapping[str, bytes],
        replies: Mapping[str, bytes],
        answers: Mapping[str, Reply | str],
    ) -> int:
        """Book a round in the ledger; returns the FM calls made."""
        spent = 0
        for client, answer in answers.items():
            account = self._ledger.account(client)
            account.bytes_down += len(tasks[client])
            account.bytes_up += len(replies.get(client, b""))
            if isinstance(answer, Reply):
                calls = self._calls(answer)
                usd = self._money(answer)
                account.add(replace(answer.usage, fm_calls=calls, usd=usd))
                self._booked[client] += calls
                self._booked_usd[client] += usd
                self._untold[client] += calls
                self._owed[client] = 0
                self._owed_usd[client] = 0.0
                spent += calls
        return spent

    def _calls(self, reply: Reply) -> int:
        """FM calls of the task, and of earlier ones whose replies were lost."""
        return max(reply.calls_before - self._booked[reply.client_id], 0) + reply.usage.fm_calls

    def _money(self, reply: Reply) -> float:
        """The same in USD. What 32-bit floats make of the same sum is no difference."""
        before = self._booked_usd[reply.client_id]
        return (reply.usd_before - before if reply.usd_before > before * (1 + 1e-6) else 0.0) + reply.usage.usd

    def _whole(self, reply: Reply) -> Reply:
        return replace(reply, usage=replace(reply.usage, fm_calls=self._untold.pop(reply.client_id, 0)))

    def _reply(self, data: bytes | None, client: str) -> Reply | str:
        """The reply, or what is wrong with it."""
        if data is None:
            return "no answer"
        try:
            reply = decode_reply(data)
        except WireError:
            return "malformed"
        # A reply to an undecodable task names no round and spent nothing.
        in_time = reply.round == self.round or (reply.round == 0 and isinstance(reply.body, Failed))
        named = reply.client_id == client and in_time
        return reply if named and self._may_be(reply) else "malformed"

    def _may_be(self, reply: Reply) -> bool:
        """Whether what it says of itself can be: no more calls or money than were granted, no more tokens than so many
        calls can take, and no sums over more texts than the client has."""
        client, usage = reply.client_id, reply.usage
        return (
            self._calls(reply) <= self._owed[client]
            and (self._max_usd is None or self._money(reply) <= self._owed_usd[client] * (1 + 1e-6))
            and usage.prompt_tokens + usage.completion_tokens <= MAX_TOKENS * usage.fm_calls
            and getattr(reply.body, "n", 0) <= self._sizes.get(client, math.inf)
        )


def _reason(answer: Reply | str) -> str:
    if isinstance(answer, Reply):
        return answer.body.reason if isinstance(answer.body, Failed) else "malformed"
    return answer
