"""Wrappers around a foundation model: books, budget, retries and shared batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import BudgetError, FMUnreachableError
from promptfed.fm.base import BaseFM
from promptfed.fm.decorators import Budgeted, Metered, Pooled, Reached, Retrying, Routed
from promptfed.fm.scripted import ScriptedFM
from promptfed.ledger import Usage
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.support import CountingFM, FailingFM, wait_for


def requests(*prompts: str) -> list[FMRequest]:
    return [TextRequest(prompt=p, max_tokens=4) for p in prompts]


class EchoFM(BaseFM):
    """Answers with the prompt in capitals; a prompt that is a number fails that many times before it works."""

    fm_id = "echo@0"
    capabilities = frozenset({Capability.TEXT})

    def __init__(self) -> None:
        self.tries: dict[str, int] = {}
        self.batches: list[list[str]] = []

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        prompts = [r.prompt for r in requests if isinstance(r, TextRequest)]
        self.batches.append(prompts)
        answers = []
        for p in prompts:
            self.tries[p] = self.tries.get(p, 0) + 1
            if p.isdigit() and self.tries[p] <= int(p):
                answers.append(FMResponse(error="busy"))
            else:
                answers.append(FMResponse(text=p.upper(), prompt_tokens=2, completion_tokens=3, usd=0.5))
        return answers


@pytest.mark.parametrize("wrap", [Budgeted, Retrying, Pooled, Metered])
def test_a_wrapper_is_the_same_model(wrap: type[BaseFM]) -> None:
    inner = ScriptedFM("x", capabilities=frozenset({Capability.TEXT}))
    wrapped = wrap(inner)  # type: ignore[call-arg]

    assert wrapped.fm_id == inner.fm_id
    assert wrapped.capabilities == frozenset({Capability.TEXT})


# ---------------------------------------------------------------- Metered


def test_metered_counts_calls_tokens_money_and_failures_until_it_starts_anew() -> None:
    fm = Metered(EchoFM())

    wait_for(fm.complete(requests("a", "9", "b")))
    first, fm.usage = fm.usage, Usage()
    wait_for(fm.complete(requests("c")))

    assert first == Usage(fm_calls=3, failed_calls=1, prompt_tokens=4, completion_tokens=6, usd=1.0)
    assert fm.usage.fm_calls == 1


# ---------------------------------------------------------------- Reached


def test_reached_lets_failed_items_pass_and_raises_where_the_model_was_not_there() -> None:
    class Away(EchoFM):
        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            answers = await super().complete(requests)
            return [FMResponse(error="HTTP 503", outage=True) if a.error and len(requests) > 2 else a for a in answers]

    (kept, failed) = wait_for(Reached(Away()).complete(requests("a", "9")))
    assert (kept.text, failed.error is not None) == ("A", True)
    with pytest.raises(FMUnreachableError, match=r"1 of 3 FM calls had no answer \(HTTP 503\)"):
        wait_for(Reached(Away()).complete(requests("a", "9", "b")))


# ---------------------------------------------------------------- Budgeted


def test_budgeted_counts_down_and_refuses_whole_batches() -> None:
    inner = EchoFM()
    fm = Budgeted(inner)
    fm.grant = 3

    wait_for(fm.complete(requests("a", "b")))
    with pytest.raises(BudgetError, match="2 FM calls wanted, 1 granted; none was made"):
        wait_for(fm.complete(requests("c", "d")))
    wait_for(fm.complete(requests("e")))

    assert inner.batches == [["a", "b"], ["e"]]
    assert fm.grant == 0


def test_nothing_is_granted_at_first_and_nothing_costs_nothing() -> None:
    fm = Budgeted(EchoFM())

    assert wait_for(fm.complete([])) == []
    with pytest.raises(BudgetError):
        wait_for(fm.complete(requests("a")))


@given(grants=st.lists(st.integers(0, 6), max_size=6), sizes=st.lists(st.integers(0, 6), max_size=12))
@settings(deadline=None, max_examples=30)
def test_calls_never_pass_the_sum_of_grants(grants: list[int], sizes: list[int]) -> None:
    inner = CountingFM(ScriptedFM())
    fm = Budgeted(inner)
    total = 0
    for i, size in enumerate(sizes):
        if i < len(grants):
            fm.grant += grants[i]
            total += grants[i]
        try:
            wait_for(fm.complete(requests(*map(str, range(size)))))
        except BudgetError:
            assert size > fm.grant
        assert inner.n_calls + fm.grant == total


# ---------------------------------------------------------------- Retrying


@pytest.mark.parametrize(("outage", "tries"), [(False, 2), (True, 4)])
def test_retrying_has_more_patience_with_a_model_that_is_away_than_with_an_item_that_it_refuses(
    outage: bool, tries: int
) -> None:
    class Failing(EchoFM):
        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            await super().complete(requests)
            return [FMResponse(error="no", outage=outage)] * len(requests)

    inner = Failing()

    wait_for(Retrying(inner, attempts=2, outage_attempts=4, wait_s=0.0).complete(requests("a")))

    assert inner.batches == [["a"]] * tries


def test_retrying_asks_again_for_what_failed_and_keeps_the_order() -> None:
    inner = EchoFM()

    answers = wait_for(Retrying(inner, attempts=3, wait_s=0.0).complete(requests("a", "2", "b", "1")))

    assert [a.text for a in answers] == ["A", "2", "B", "1"]
    assert inner.batches == [["a", "2", "b", "1"], ["2", "1"], ["2"]]


def test_retrying_gives_up_after_the_given_number_of_attempts_and_returns_the_failure() -> None:
    inner = EchoFM()

    (answer,) = wait_for(Retrying(inner, attempts=3, wait_s=0.0).complete(requests("3")))

    assert answer.error == "busy"
    assert len(inner.batches) == 3


def test_one_attempt_is_no_retry() -> None:
    inner = EchoFM()

    wait_for(Retrying(inner, attempts=1, wait_s=60.0).complete(requests("1")))

    assert len(inner.batches) == 1


def test_waits_double(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)

    wait_for(Retrying(EchoFM(), attempts=4, wait_s=0.5).complete(requests("9")))

    assert waits == [0.5, 1.0, 2.0]


# ---------------------------------------------------------------- Pooled


def test_what_clients_ask_in_one_turn_is_one_batch() -> None:
    inner = EchoFM()
    fm = Pooled(inner)

    async def all_at_once() -> list[list[FMResponse]]:
        return await asyncio.gather(*(fm.complete(requests("a")) for _ in range(3)))

    answers = wait_for(all_at_once())

    assert [[a.text for a in mine] for mine in answers] == [["A"], ["A"], ["A"]]
    assert inner.batches == [["a", "a", "a"]]


def test_each_prompt_is_a_batch_of_its_own_whoever_asks() -> None:
    inner = EchoFM()
    fm = Pooled(inner)

    async def all_at_once() -> list[list[FMResponse]]:
        return await asyncio.gather(fm.complete(requests("a", "b", "a")), fm.complete(requests("b", "c")))

    answers = wait_for(all_at_once())

    assert [[a.text for a in mine] for mine in answers] == [["A", "B", "A"], ["B", "C"]]
    assert inner.batches == [["a", "a"], ["b", "b"], ["c"]]


def test_a_client_that_comes_a_turn_later_still_joins() -> None:
    inner = EchoFM()
    fm = Pooled(inner)

    async def late(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await fm.complete(requests("a"))

    async def staggered() -> None:
        await asyncio.gather(late(0), late(1), late(3))

    wait_for(staggered())

    assert inner.batches == [["a", "a", "a"]]


def test_one_round_after_the_other_and_in_another_loop() -> None:
    inner = EchoFM()
    fm = Pooled(inner)

    async def twice() -> None:
        await fm.complete(requests("a"))
        await fm.complete(requests("b"))

    wait_for(twice())
    wait_for(fm.complete(requests("c")))  # a loop of its own

    assert inner.batches == [["a"], ["b"], ["c"]]


def test_an_error_reaches_everybody_who_asked_and_nobody_hangs() -> None:
    fm = Pooled(FailingFM(RuntimeError("down")))

    async def all_at_once() -> list[object]:
        together = asyncio.gather(*(fm.complete(requests(p)) for p in "abc"), return_exceptions=True)
        return list(await asyncio.wait_for(together, timeout=5))

    assert [str(e) for e in wait_for(all_at_once())] == ["down"] * 3


def test_a_client_that_gave_up_does_not_hold_up_the_others() -> None:
    inner = EchoFM()
    fm = Pooled(inner)

    async def one_gives_up() -> list[FMResponse]:
        leaver = asyncio.create_task(fm.complete(requests("a")))
        stayer = asyncio.create_task(fm.complete(requests("b")))
        await asyncio.sleep(0)
        leaver.cancel()
        return await asyncio.wait_for(stayer, timeout=5)

    assert [a.text for a in wait_for(one_gives_up())] == ["B"]


def test_routed_lets_one_model_write_and_the_other_score_in_the_order_asked() -> None:
    scorer, writer = CountingFM(ScriptedFM()), EchoFM()
    both = Routed(scorer, writer)
    score = LabelRequest(prefix="Text:", text=" fine", suffix="", labels=(" a", " b"))

    answers = wait_for(both.complete([*requests("one"), score, *requests("two")]))

    assert [a.text for a in answers] == ["ONE", None, "TWO"]
    assert answers[1].logprobs is not None
    assert scorer.requests == [score]
    assert writer.batches == [["one", "two"]]
    assert both.capabilities == {Capability.TEXT, Capability.LABEL_LOGPROBS}


def test_outages_do_not_use_up_the_attempts_of_an_item() -> None:
    class Stormy(EchoFM):
        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            answers = await super().complete(requests)
            return [replace(a, outage=self.tries["4"] <= 2) if a.error else a for a in answers]

    inner = Stormy()  # two outages, two failures of its own, then an answer

    (answer,) = wait_for(Retrying(inner, attempts=3, outage_attempts=3, wait_s=0).complete(requests("4")))

    assert (answer.text, inner.tries) == ("4", {"4": 5})


# ---------------------------------------------------------------- Retry-After


def test_retrying_waits_as_long_as_the_model_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    class Busy(EchoFM):
        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            asked_for = iter([7.0, 0.1, None])
            answers = await super().complete(requests)
            return [replace(a, retry_after_s=next(asked_for), outage=True) if a.error else a for a in answers]

    monkeypatch.setattr("promptfed.fm.decorators.asyncio.sleep", sleep)

    wait_for(Retrying(Busy(), wait_s=0.5).complete(requests("3")))

    assert waited == [7.0, 7.0, 7.0]
    waited.clear()
    wait_for(Retrying(EchoFM(), wait_s=0.5, attempts=4).complete(requests("3")))
    assert waited == [0.5, 1.0, 2.0]
