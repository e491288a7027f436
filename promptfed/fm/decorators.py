"""Foundation models around a foundation model: Budgeted(Metered(Reached(Pooled(RecordingFM(Retrying(...))))))."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence

from promptfed.errors import BudgetError, FMUnreachableError, SpendingLimitError
from promptfed.fm.base import BaseFM, WrappedFM
from promptfed.ledger import Usage
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest


class Metered(WrappedFM):
    """Counts every answer in ``usage``, which its owner may replace to start anew."""

    def __init__(self, inner: BaseFM) -> None:
        super().__init__(inner)
        self.usage = Usage()

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        answers = await self._inner.complete(requests)
        for answer in answers:
            self.usage.add_answer(answer)
        return answers


class Reached(WrappedFM):
    """Raises `FMUnreachableError` where the model was not reached: that no text was answered must not look like texts
    that it refused."""

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        answers = await self._inner.complete(requests)
        if lost := [answer for answer in answers if answer.outage]:
            raise FMUnreachableError(f"{len(lost)} of {len(answers)} FM calls had no answer ({lost[0].error})")
        return answers


class Budgeted(WrappedFM):
    """Refuses calls beyond ``grant``, the number of calls that the current task may make, and those that could cost
    more than ``usd``, the money that it may spend (None: as much as it takes). None is made in part."""

    def __init__(self, inner: BaseFM) -> None:
        super().__init__(inner)
        self.grant = 0
        self.usd: float | None = None

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        if len(requests) > self.grant:
            raise BudgetError(f"{len(requests)} FM calls wanted, {self.grant} granted; none was made")
        if self.usd is not None and (most := self.most_usd(requests)) > self.usd:
            raise SpendingLimitError(f"{len(requests)} FM calls could cost {most:.4g} USD, {self.usd:.4g} are left")
        self.grant -= len(requests)
        answers = await self._inner.complete(requests)
        if self.usd is not None:
            self.usd -= sum(answer.usd for answer in answers)
        return answers


class Routed(WrappedFM):
    """Lets ``proposer`` write and ``inner`` score: two models behind one seam."""

    def __init__(self, inner: BaseFM, proposer: BaseFM) -> None:
        super().__init__(inner)
        self._proposer = proposer

    @property
    def fm_id(self) -> str:
        return f"{self._inner.fm_id} (texts by {self._proposer.fm_id})"

    @property
    def capabilities(self) -> frozenset[Capability]:
        text = frozenset({Capability.TEXT})
        return (self._inner.capabilities - text) | (self._proposer.capabilities & text)

    @property
    def in_process(self) -> bool:
        return self._inner.in_process and self._proposer.in_process

    @property
    def is_priced(self) -> bool:
        return self._inner.is_priced and self._proposer.is_priced

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        answers: dict[int, FMResponse] = {}
        for model, kind in ((self._proposer, TextRequest), (self._inner, LabelRequest)):
            mine = [i for i, request in enumerate(requests) if isinstance(request, kind)]
            if mine:
                answers |= zip(mine, await model.complete([requests[i] for i in mine]), strict=True)
        return [answers[i] for i in range(len(requests))]


class Retrying(WrappedFM):
    """Asks again for items that failed: ``attempts`` times in all where the item itself failed, and ``outage_attempts``
    times where the model was not reached, each counted by itself. Waits ``wait_s`` times 1, 2, 4, ..., or as long as
    the model asked for (Retry-After)."""

    def __init__(self, inner: BaseFM, *, attempts: int = 3, outage_attempts: int = 5, wait_s: float = 0.5) -> None:
        super().__init__(inner)
        self._attempts, self._outage_attempts, self._wait_s = attempts, outage_attempts, wait_s

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        answers = await self._inner.complete(requests)
        failures: Counter[tuple[int, bool]] = Counter()  # of an item: by itself, and in an outage
        most = {False: self._attempts, True: self._outage_attempts}
        pending, wait_s = list(range(len(requests))), self._wait_s
        while True:
            pending = [i for i in pending if answers[i].error is not None]
            failures.update((i, answers[i].outage) for i in pending)
            pending = [i for i in pending if all(failures[i, kind] < n for kind, n in most.items())]
            if not pending:
                return answers
            await asyncio.sleep(max(wait_s, *(answers[i].retry_after_s or 0.0 for i in pending)))
            wait_s *= 2
            for i, answer in zip(pending, await self._inner.complete([requests[i] for i in pending]), strict=True):
                answers[i] = answer


class Pooled(WrappedFM):
    """Joins what clients ask in the same turn of the event loop into one batch a prompt, for a provider they share.

    Waiting clients are gathered until no new request came in for a few turns. A batch holds everything that was asked
    of one prompt, so what is in it does not depend on the order of arrival, nor on the other prompts.
    """

    QUIET_TURNS = 3

    def __init__(self, inner: BaseFM) -> None:
        super().__init__(inner)
        self._waiting: list[tuple[Sequence[FMRequest], asyncio.Future[list[FMResponse]]]] = []
        self._gathering: asyncio.Task[None] | None = None

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        future: asyncio.Future[list[FMResponse]] = asyncio.get_running_loop().create_future()
        self._waiting.append((requests, future))
        if self._gathering is None or self._gathering.done():
            self._gathering = asyncio.create_task(self._gather())
        return await future

    async def _gather(self) -> None:
        while self._waiting:
            seen, quiet = len(self._waiting), 0
            while quiet < self.QUIET_TURNS:
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._waiting) == seen else 0
                seen = len(self._waiting)
            waiting, self._waiting = self._waiting, []
            answers = await self._ask([r for requests, _ in waiting for r in requests])
            start = 0
            for requests, future in waiting:
                mine = answers[start : start + len(requests)]
                start += len(requests)
                broken = next((a for a in mine if isinstance(a, BaseException)), None)
                if future.done():
                    continue
                if broken is not None:
                    future.set_exception(broken)
                else:
                    future.set_result([a for a in mine if isinstance(a, FMResponse)])

    async def _ask(self, requests: Sequence[FMRequest]) -> list[FMResponse | BaseException]:
        """The answer to each request, or what its batch broke with: a batch that fails fails those who asked for it."""
        batches: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            batches[request.prefix if isinstance(request, LabelRequest) else request.prompt].append(i)
        done = await asyncio.gather(
            *(self._inner.complete([requests[i] for i in mine]) for mine in batches.values()), return_exceptions=True
        )
        answers: dict[int, FMResponse | BaseException] = {}
        for mine, part in zip(batches.values(), done, strict=True):
            answers |= dict.fromkeys(mine, part) if isinstance(part, BaseException) else zip(mine, part, strict=True)
        return [answers[i] for i in range(len(requests))]
