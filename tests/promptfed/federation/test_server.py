"""The round engine: budget, books, failures and events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from promptfed.errors import BudgetError, QuorumError, RunError
from promptfed.federation.checkpoint import Checkpoint
from promptfed.federation.events import EventLog
from promptfed.federation.inprocess import InProcessTransport
from promptfed.federation.server import MAX_REPLY, Limits, Server
from promptfed.ledger import Ledger, Usage
from promptfed.messages import (
    Adopted,
    Failed,
    Joined,
    Reply,
    ReplyBody,
    Scored,
    Task,
    Trained,
    Votes,
    decode_task,
    encode,
)
from promptfed.strategies.base import Round, Steps
from promptfed.types import FMResponse
from tests.support import JOIN, wait_for

JOINED = Joined(fm="m", encoder="e", capabilities=(), n_train=4, n_test=2, labels=("a", "b"), n_dropped=0)
Handler = Callable[[Task], bytes | None]


class Post:
    """A transport whose clients are plain functions; None is a client that did not answer."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self.handlers = handlers
        self.sent: list[dict[str, Task]] = []
        self.awaited: list[list[str]] = []

    async def exchange(
        self, tasks: Mapping[str, bytes], awaited: Collection[str], deadline_s: float | None
    ) -> dict[str, bytes]:
        self.awaited.append(sorted(awaited))
        decoded = {client: decode_task(data) for client, data in tasks.items()}
        self.sent.append(decoded)
        answers = {client: self.handlers[client](task) for client, task in decoded.items()}
        return {client: data for client, data in answers.items() if data is not None}


def says(body: ReplyBody, fm_calls: int = 0) -> Handler:
    def handle(task: Task) -> bytes:
        return encode(Reply(round=task.round, client_id=task.client_id, usage=Usage(fm_calls=fm_calls), body=body))

    return handle


def spends_its_grant(task: Task) -> bytes:
    return says(JOINED, task.grant)(task)


def server(handlers: Mapping[str, Handler], quorum: float = 0.01) -> tuple[Server, Post, Ledger, EventLog]:
    post, ledger, events = Post(handlers), Ledger(), EventLog()
    return Server(post, ledger, events, limits=Limits(quorum=quorum)), post, ledger, events


def rounds(*grants: Mapping[str, int], clients: str = "ab") -> Steps[list[dict[str, Reply]]]:
    """A method that sends one round a grant and returns what came back."""
    got = []
    for i, grant in enumerate(grants):
        got.append(dict((yield Round(name=f"r{i}", tasks=dict.fromkeys(clients, JOIN), grants=grant))))
    return got


def test_tasks_carry_round_client_run_fleet_and_grant() -> None:
    post = Post({"a": spends_its_grant, "b": spends_its_grant})
    s = Server(post, Ledger(), EventLog(), run="run7", fleet="zero_shot")

    wait_for(s.drive(rounds({"a": 3}, {"b": 2}), "baselines", 10))

    first, second = post.sent
    assert first["a"] == Task(round=1, client_id="a", run="run7", fleet="zero_shot", grant=3, limit=3, body=JOIN)
    assert first["b"].grant == 0
    assert (second["a"].round, second["b"].grant) == (2, 2)
    assert (second["a"].limit, second["b"].limit) == (3, 2)


def test_the_method_gets_replies_by_client_and_its_result_comes_back() -> None:
    s, _, _, _ = server({"a": says(JOINED, 1), "b": says(Adopted(n_calibration=5))})

    (got,) = wait_for(s.drive(rounds({"a": 1}), "tuning", 1))

    assert got["a"] == Reply(round=1, client_id="a", usage=Usage(fm_calls=1), body=JOINED)
    assert got["b"].body == Adopted(n_calibration=5)


def test_rounds_are_numbered_through_all_phases() -> None:
    s, post, _, _ = server({"a": spends_its_grant, "b": spends_its_grant})

    wait_for(s.drive(rounds({}, {}), "tuning", 0))
    wait_for(s.drive(rounds({}), "evaluation", 0))

    assert [sent["a"].round for sent in post.sent] == [1, 2, 3]
    assert s.round == 3


# ---------------------------------------------------------------- budget


def test_a_round_that_would_pass_the_budget_is_not_sent() -> None:
    s, post, _, _ = server({"a": spends_its_grant, "b": spends_its_grant})

    with pytest.raises(BudgetError, match=r"'r1' wants 6 FM calls; 5 of 10 are left"):
        wait_for(s.drive(rounds({"a": 3, "b": 2}, {"a": 3, "b": 3}), "tuning", 10))

    assert len(post.sent) == 1


def test_the_whole_budget_may_be_spent() -> None:
    s, post, _, _ = server({"a": spends_its_grant, "b": spends_its_grant})

    wait_for(s.drive(rounds({"a": 3, "b": 2}, {"a": 5}), "tuning", 10))

    assert len(post.sent) == 2


def test_calls_that_were_granted_and_not_made_may_be_granted_again() -> None:
    s, post, _, _ = server({"a": says(JOINED, 1), "b": says(JOINED, 0)})

    wait_for(s.drive(rounds({"a": 5}, {"a": 4}), "tuning", 5))

    assert len(post.sent) == 2


def test_calls_of_a_reply_that_was_lost_are_booked_when_the_client_replies_again() -> None:
    def lost(task: Task) -> bytes | None:
        if task.round < 3:
            return None
        return encode(Reply(round=3, client_id="a", usage=Usage(fm_calls=2), calls_before=4, body=JOINED))

    s, _, ledger, events = server({"a": lost, "b": says(JOINED)})

    # Of 12 granted, a made 4 + 2: 6 of the 12 of the budget are left.
    got = wait_for(s.drive(rounds({"a": 5}, {"a": 5}, {"a": 2}, {"b": 6}), "tuning", 12))

    assert got[2]["a"].usage.fm_calls == 6
    assert ledger.total("tuning").fm_calls == 6
    assert [e["fm_calls"] for e in events.events if e["kind"] == "round"] == [0, 0, 6, 0]


def test_a_grant_that_is_open_is_not_granted_again() -> None:
    s, post, _, _ = server({"a": lambda _: None, "b": says(JOINED)})

    with pytest.raises(BudgetError, match="wants 6 FM calls; 5 of 10 are left"):
        wait_for(s.drive(rounds({"a": 5}, {"b": 6}), "tuning", 10))

    assert len(post.sent) == 1


@pytest.mark.parametrize(
    ("first", "granted", "spent"),
    [(lambda _: None, 5, 5), (lambda _: b"rubbish", 5, 5), (says(Failed(reason="FMError"), 3), 0, 3)],
    ids=["lost", "malformed", "failed"],
)
def test_what_is_open_may_be_spent_on_the_same_requests_and_is_counted_once(
    first: Handler, granted: int, spent: int
) -> None:
    def method() -> Steps[None]:
        yield Round(name="ask", tasks={"a": JOIN, "b": JOIN}, grants={"a": 5})
        yield Round(name="score", tasks={"a": JOIN, "b": JOIN}, again={"a": 5})

    s, post, ledger, _ = server({"a": lambda t: first(t) if t.round == 1 else spends_its_grant(t), "b": says(JOINED)})

    wait_for(s.drive(method(), "tuning", 5))

    assert [tasks["a"].grant for tasks in post.sent] == [5, granted]
    assert ledger.total("tuning").fm_calls == spent


@pytest.mark.parametrize(("before", "calls", "good"), [(4, 2, True), (4, 4, False), (8, 0, False)])
def test_more_calls_than_were_granted_are_malformed(before: int, calls: int, good: bool) -> None:
    def handle(task: Task) -> bytes | None:
        if task.round == 1:
            return None
        usage = Usage(fm_calls=calls)
        return encode(Reply(round=2, client_id="a", usage=usage, calls_before=before, body=JOINED))

    s, _, _, _ = server({"a": handle, "b": says(JOINED)})

    got = wait_for(s.drive(rounds({"a": 5}, {"a": 2}), "tuning", 10))

    assert ("a" in got[1]) == good


def test_calls_of_a_client_that_failed_count_against_the_budget() -> None:
    s, post, _, _ = server({"a": says(Failed(reason="IndexError"), 8), "b": says(JOINED)})

    with pytest.raises(BudgetError):
        wait_for(s.drive(rounds({"a": 8}, {"b": 8}), "tuning", 10))

    assert len(post.sent) == 1


@pytest.mark.parametrize("lost", [lambda _: None, lambda _: b"rubbish"], ids=["no answer", "malformed"])
def test_a_grant_whose_spending_is_not_known_counts_as_spent(lost: Handler) -> None:
    s, post, _, _ = server({"a": lost, "b": says(JOINED)})

    with pytest.raises(BudgetError):
        wait_for(s.drive(rounds({"a": 8}, {"b": 8}), "tuning", 10))

    assert len(post.sent) == 1


def test_a_client_cannot_talk_the_budget_up() -> None:
    """A negative number of calls is a malformed reply, or is at least not believed."""
    s, post, _, _ = server({"a": says(JOINED, -100), "b": says(JOINED)})

    with pytest.raises(BudgetError):
        wait_for(s.drive(rounds({"a": 10}, {"b": 11}), "tuning", 10))

    assert len(post.sent) == 1


# ---------------------------------------------------------------- tokens and money


def priced(limits: Limits) -> tuple[Server, Post]:
    """Clients whose calls cost 9 prompt tokens, 1 written token and a quarter dollar each."""

    def pays(task: Task) -> bytes:
        usage = Usage()
        for _ in range(task.grant):
            usage.add_answer(FMResponse(prompt_tokens=9, completion_tokens=1, usd=0.25))
        return encode(Reply(round=task.round, client_id=task.client_id, usage=usage, body=JOINED))

    post = Post({"a": pays, "b": pays})
    return Server(post, Ledger(), EventLog(), limits=limits), post


@pytest.mark.parametrize("limits", [Limits(max_tokens=60), Limits(max_usd=1.5), Limits()])
def test_a_run_within_its_limits_goes_through(limits: Limits) -> None:
    s, post = priced(limits)

    wait_for(s.drive(rounds({"a": 4}, {"b": 2}, {}), "tuning", 100))  # 6 calls: 60 tokens, 1.50 dollars

    assert len(post.sent) == 3


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(max_tokens=59), r"about 60, over budget\.max_tokens = 59"),
        (Limits(max_usd=1.49), r"about 1\.5, over budget\.max_usd = 1\.49"),
    ],
)
def test_a_round_that_would_pass_a_limit_is_not_sent(limits: Limits, expected: str) -> None:
    s, post = priced(limits)

    with pytest.raises(BudgetError, match=expected):
        wait_for(s.drive(rounds({"a": 4}, {"b": 2}), "tuning", 100))

    assert len(post.sent) == 1


def test_the_money_that_is_left_is_shared_by_calls() -> None:
    s, post = priced(Limits(max_usd=6.0))

    wait_for(s.drive(rounds({"a": 4}, {"a": 1, "b": 3}, {}), "tuning", 100))  # 4 calls: a dollar

    shares = [{client: task.usd for client, task in tasks.items() if task.grant} for tasks in post.sent]
    assert shares == [{"a": 6.0}, {"a": 1.25, "b": 3.75}, {}]


def test_what_a_silent_client_may_have_spent_is_not_given_out_again() -> None:
    s, post = priced(Limits(max_usd=8.0))
    post.handlers["b"] = lambda _: None

    wait_for(s.drive(rounds({"a": 1, "b": 1}, {"a": 2}), "tuning", 100))

    assert post.sent[1]["a"].usd == 3.75  # 8 less a's quarter less b's half of 8


def test_money_of_a_reply_that_was_lost_is_booked_when_the_client_replies_again() -> None:
    def handle(task: Task) -> bytes | None:
        if task.round == 2:
            return None
        usage = Usage(fm_calls=task.grant, usd=0.1 * task.grant)
        before = 0.0 if task.round == 1 else 0.3
        calls = {1: 0, 3: 3}[task.round]
        return encode(
            Reply(round=task.round, client_id="a", usage=usage, calls_before=calls, usd_before=before, body=JOINED)
        )

    post, ledger = Post({"a": handle}), Ledger()
    s = Server(post, ledger, EventLog(), limits=Limits(max_usd=6.0, quorum=0.0))
    lost = Round(name="r", tasks={"a": JOIN}, grants={"a": 2}, optional=True)

    def method() -> Steps[None]:
        yield Round(name="r", tasks={"a": JOIN}, grants={"a": 1})
        yield lost
        yield Round(name="r", tasks={"a": JOIN}, grants={"a": 1})

    wait_for(s.drive(method(), "tuning", 10))

    total = ledger.total("tuning")
    assert total.fm_calls == 4
    assert total.usd == pytest.approx(0.4)


def test_limits_are_for_tuning_only() -> None:
    s, post = priced(Limits(max_tokens=1))

    wait_for(s.drive(rounds({"a": 4}, {"b": 2}), "evaluation", 100))

    assert len(post.sent) == 2


# ---------------------------------------------------------------- failures


def test_failed_malformed_and_missing_replies_are_logged_and_left_out() -> None:
    s, _, _, events = server(
        {
            "a": says(JOINED),
            "b": says(Failed(reason="DataError")),
            "c": lambda _: b"\xff\xff rubbish",
            "d": lambda _: None,
        }
    )

    (got,) = wait_for(s.drive(rounds({}, clients="abcd"), "tuning", 0))

    assert set(got) == {"a"}
    assert events.events[-1]["failures"] == {"b": "DataError", "c": "malformed", "d": "no answer"}


def test_a_reply_that_is_too_large_is_malformed_and_not_kept(tmp_path: Path) -> None:
    huge = encode(Reply(round=1, client_id="a", usage=Usage(), body=Votes(n_labels=1, shares=bytes(MAX_REPLY))))
    post, events = Post({"a": lambda _: huge, "b": says(JOINED)}), EventLog()
    s = Server(post, Ledger(), events, Checkpoint(tmp_path), limits=Limits(quorum=0.01))

    (got,) = wait_for(s.drive(rounds({}), "tuning", 0))

    assert set(got) == {"b"}
    assert events.events[0]["failures"] == {"a": "malformed"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000


def test_a_round_that_nobody_answered_is_a_run_error_with_the_reasons() -> None:
    s, _, _, _ = server({"a": says(Failed(reason="KeyError")), "b": lambda _: None})

    with pytest.raises(RunError, match=r"round 1 \(r0\): 0 of 2 clients answered.*a: KeyError, b: no answer"):
        wait_for(s.drive(rounds({}), "tuning", 0))


@pytest.mark.parametrize(("quorum", "enough"), [(0.5, True), (0.7, False), (0.75, False), (1.0, False), (0.01, True)])
def test_a_round_counts_only_with_a_quorum(quorum: float, enough: bool) -> None:
    handlers = {"a": says(JOINED), "b": says(JOINED), "c": lambda _: None, "d": lambda _: b"rubbish"}
    s, _, ledger, events = server(handlers, quorum)
    method = rounds({"a": 0}, clients="abcd")

    if enough:
        (got,) = wait_for(s.drive(method, "tuning", 0))
        assert set(got) == {"a", "b"}
    else:
        with pytest.raises(QuorumError, match=r"2 of 4 clients answered.*asks for [34] .*go on with promptfed resume"):
            wait_for(s.drive(method, "tuning", 0))
        assert events.events == []  # nothing of it counts: the round is done again when the run is resumed
        assert ledger.total("tuning").bytes_up == 0


def test_the_quorum_is_exact_where_the_share_is() -> None:
    answering = dict.fromkeys("abcdefg", says(JOINED))
    s, _, _, _ = server({**answering, **dict.fromkeys("hij", lambda _: None)}, quorum=0.7)

    (got,) = wait_for(s.drive(rounds({}, clients="abcdefghij"), "tuning", 0))

    assert len(got) == 7


def test_no_round_waits_for_a_client_that_did_not_answer_until_it_has_answered_one() -> None:
    answers = iter([None, None, JOINED, JOINED])

    def now_and_then(task: Task) -> bytes | None:
        body = next(answers)
        return body and says(body)(task)

    s, post, _, _ = server({"a": says(JOINED), "b": now_and_then})

    got = wait_for(s.drive(rounds({}, {}, {}, {}), "tuning", 0))

    assert [sorted(replies) for replies in got] == [["a"], ["a"], ["a", "b"], ["a", "b"]]
    assert post.awaited == [["a", "b"], ["a"], ["a"], ["a", "b"]]


def test_whom_no_round_waits_for_is_sent_the_same_bytes() -> None:
    """A run that goes on may find others connected than when it began, and its tasks have to be those of before."""

    def method() -> Steps[None]:
        yield Round(name="ask", tasks={"a": JOIN, "b": JOIN}, grants={"a": 5})
        for _ in range(2):
            yield Round(name="score", tasks={"a": JOIN, "b": JOIN}, again={"a": 5})

    answers = iter([None, JOINED, JOINED])
    first, everybody, _, _ = server({"a": lambda _: None, "b": says(JOINED)})
    again, late, _, _ = server({"a": lambda t: (body := next(answers)) and says(body)(t), "b": says(JOINED)})

    wait_for(first.drive(method(), "tuning", 10))
    again.expect_absent({"a"})
    wait_for(again.drive(method(), "tuning", 10))

    assert everybody.awaited == [["a", "b"]] * 3
    assert late.awaited == [["b"], ["b"], ["a", "b"]]
    assert late.sent[:2] == everybody.sent[:2]


@pytest.mark.parametrize(
    ("body", "usage", "good"),
    [
        (Scored(n=4, total=(4.0,), diff=(), diff_sq=()), Usage(fm_calls=1), True),
        (Scored(n=5, total=(4.0,), diff=(), diff_sq=()), Usage(fm_calls=1), False),  # of 4 texts
        (Trained(n=2**40, parameters=(1.0,)), Usage(), False),
        (JOINED, Usage(fm_calls=1, prompt_tokens=2000, usd=0.5), True),
        (JOINED, Usage(fm_calls=1, prompt_tokens=10**15), False),
        (JOINED, Usage(prompt_tokens=1), False),
        (JOINED, Usage(fm_calls=1, usd=1e9), False),
    ],
)
def test_what_can_not_be_is_malformed(body: ReplyBody, usage: Usage, good: bool) -> None:
    def handle(task: Task) -> bytes:
        is_first = task.round == 1
        said = (Usage(), JOINED) if is_first else (usage, body)
        return encode(Reply(round=task.round, client_id="a", usage=said[0], body=said[1]))

    post, ledger = Post({"a": handle, "b": says(JOINED)}), Ledger()
    s = Server(post, ledger, EventLog(), limits=Limits(max_usd=6.0, max_tokens=10**9, quorum=0.01))

    got = wait_for(s.drive(rounds({}, {"a": 2}, {"a": 1}), "tuning", 10))

    assert ("a" in got[1]) == good
    assert ledger.total("tuning").usd <= 6.0


def test_who_may_catch_up_is_waited_for_until_it_has_missed_a_third_round() -> None:
    def method() -> Steps[None]:
        for _ in range(2):
            yield Round(name="ask", tasks={"a": JOIN, "b": JOIN}, grants={"a": 5})
            yield Round(name="score", tasks={"a": JOIN, "b": JOIN}, again={"a": 5})

    s, post, _, _ = server({"a": lambda _: None, "b": says(JOINED)})

    wait_for(s.drive(method(), "tuning", 10))

    assert post.awaited == [["a", "b"], ["a", "b"], ["b"], ["b"]]
    assert [tasks["a"].grant for tasks in post.sent] == [5, 5, 5, 0]
    assert [tasks["a"].limit for tasks in post.sent] == [5, 5, 10, 10]


def test_a_client_that_came_late_is_asked_to_join_until_it_does() -> None:
    answers = iter([None, JOINED])
    joined: dict[str, Joined] = {}

    def late(task: Task) -> bytes | None:
        assert task.body == JOIN
        body = next(answers)
        return body and says(body)(task)

    s, post, _, events = server({"a": says(JOINED), "b": says(JOINED), "c": late}, quorum=1.0)
    s.invite(["c"], JOIN, joined.__setitem__)

    got = wait_for(s.drive(rounds({}, {}, {}), "tuning", 0))

    assert joined == {"c": JOINED}
    assert all(set(replies) == {"a", "b"} for replies in got)  # joining is the server's affair
    assert [sorted(sent) for sent in post.sent] == [["a", "b", "c"], ["a", "b", "c"], ["a", "b"]]
    assert post.awaited == [["a", "b"]] * 3
    assert [e["round"] for e in events.events if e["kind"] == "joined"] == [2]


def test_the_phase_of_the_books_ends_with_a_run_that_broke_off() -> None:
    s, _, ledger, _ = server({"a": says(JOINED), "b": says(JOINED)})

    with pytest.raises(BudgetError):
        wait_for(s.drive(rounds({"a": 1}), "baselines", 0))

    assert ledger.phase == "tuning"


# ---------------------------------------------------------------- books


def test_bytes_are_booked_as_serialised() -> None:
    s, post, ledger, events = server({"a": spends_its_grant, "b": lambda _: b"rubbish"})

    wait_for(s.drive(rounds({"a": 2}), "evaluation", 2))

    task = {c: len(encode(t)) for c, t in post.sent[0].items()}
    reply = len(encode(Reply(round=1, client_id="a", usage=Usage(fm_calls=2), body=JOINED)))
    booked = ledger.as_dict()["evaluation"]["by_client"]
    assert (booked["a"]["bytes_down"], booked["a"]["bytes_up"]) == (task["a"], reply)
    assert (booked["b"]["bytes_down"], booked["b"]["bytes_up"]) == (task["b"], len(b"rubbish"))
    assert events.events[-1]["bytes_down"] == task["a"] + task["b"]
    assert events.events[-1]["bytes_up"] == reply + len(b"rubbish")


def test_a_round_is_one_event() -> None:
    s, _, _, events = server({"a": spends_its_grant, "b": spends_its_grant})

    wait_for(s.drive(rounds({"a": 2, "b": 1}), "tuning", 3))

    (event,) = events.events
    expected = {"kind": "round", "seq": 0, "round": 1, "phase": "tuning", "name": "r0", "n_clients": 2, "fm_calls": 3}
    assert expected.items() <= event.items()
    assert event["failures"] == {}


# ---------------------------------------------------------------- the in-process transport


class Echo:
    def __init__(self, name: str) -> None:
        self.name = name

    async def handle(self, task: bytes) -> bytes:
        return self.name.encode() + task


def test_in_process_replies_belong_to_their_clients() -> None:
    transport = InProcessTransport({name: Echo(name) for name in "cab"})

    got = wait_for(transport.exchange({"b": b"2", "a": b"1"}, "ab", None))

    assert got == {"a": b"a1", "b": b"b2"}


class Slow:
    """Answers after ``waits[i]`` seconds to its i-th task, or raises."""

    def __init__(self, *waits: float) -> None:
        self._waits, self.handled = iter(waits), list[bytes]()

    async def handle(self, task: bytes) -> bytes:
        wait = next(self._waits)
        if wait < 0:
            raise ConnectionError
        await asyncio.sleep(wait)
        self.handled.append(task)
        return b"done " + task


def exchanges(transport: InProcessTransport, *rounds: tuple[bytes, str, float | None]) -> list[dict[str, bytes]]:
    """One exchange with clients a and b a (task, awaited, deadline)."""

    async def go() -> list[dict[str, bytes]]:
        return [await transport.exchange({"a": task, "b": task}, awaited, end) for task, awaited, end in rounds]

    return wait_for(go())


def test_a_client_that_is_late_is_missing_and_its_next_task_waits_for_the_last() -> None:
    slow = Slow(0.2, 0.0)
    transport = InProcessTransport({"a": Slow(0.0, 0.0), "b": slow})

    first, second = exchanges(transport, (b"1", "ab", 0.05), (b"2", "ab", 5.0))

    assert first == {"a": b"done 1"}
    assert second == {"a": b"done 2", "b": b"done 2"}
    assert slow.handled == [b"1", b"2"]


def test_who_is_not_awaited_is_not_waited_for_and_counts_if_it_was_quick() -> None:
    transport = InProcessTransport({"a": Slow(0.05, 0.05), "b": Slow(0.0, 60.0)})

    first, second = exchanges(transport, (b"1", "a", None), (b"2", "a", None))

    assert first == {"a": b"done 1", "b": b"done 1"}
    assert second == {"a": b"done 2"}


def test_a_client_that_raises_has_not_answered() -> None:
    transport = InProcessTransport({"a": Slow(0.0, 0.0), "b": Slow(-1, 0.0)})

    assert exchanges(transport, (b"1", "ab", None), (b"2", "ab", None)) == [
        {"a": b"done 1"},
        {"a": b"done 2", "b": b"done 2"},
    ]
