"""The asker's side of federated retrieval: route a query to a few owners, ask them at once, merge what they find.

    retriever = FederatedRetriever(transport, owners, encoder, asker="north", n_ask=5)
    hits = retriever.search(["How many days of leave are there?"], k=10)

``transport`` is any `promptfed.types.Transport`: owners in this process, or at the other end of a network.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, get_args

import numpy as np

from promptfed.errors import CapabilityError, ConfigError, WireError
from promptfed.fm.base import run_sync
from promptfed.messages import Failed, Task, decode_reply, encode
from promptfed.messages.methods import packed, unpacked
from promptfed.messages.retrieval import (
    MAX_HITS,
    Describe,
    Described,
    Fetch,
    Found,
    Search,
    Share,
    Shown,
    TaskBody,
)
from promptfed.types import Encoder, FloatArray, Hit, IntArray, QueryForm, SearchMode, Transport
from retrieval.documents import whole
from retrieval.merging import CrossEncoder, Merge, by_score, cori
from retrieval.routing import BoolArray, CentroidRouter, Router, chosen

log = logging.getLogger("promptfed.retrieval")

# Shares of the deadline by the end of which owners have to say what they are like, and what they found: some of it is
# left for showing it, however late the last of them is.
DESCRIBED_BY, FOUND_BY = 0.3, 0.7
# Passages shown beside those that are wanted, to stand in for those that turn out to be doubles; and what part more
# each owner is asked for, since its own may be doubles.
SPARE, MORE = 2, 0.5
# Share of the time left that a round of showing may take: another round may be needed where an owner falls silent.
SHOWN_BY = 0.5
# Passages that a cross-encoder reads, for one that is wanted.
READ_AGAIN = 3
Body = TypeVar("Body")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What was found, and who was asked. ``hits``: a list a query, the best first. ``asked``: for each query the owners
    that were asked; ``silent``: those that gave no answer in time, or failed, in one of its steps; ``unfit``: those
    that can't read a query in the form that it is sent in, or share nothing with the asker, and why."""

    hits: list[list[Hit]]
    asked: list[tuple[str, ...]]
    silent: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)


def check_k(k: int) -> None:
    """Raises `ConfigError` for a number of passages that can't be asked for."""
    if not 1 <= k <= MAX_HITS:
        raise ConfigError(f"a search for k = {k} passages: expected 1 to {MAX_HITS:,}")


class FederatedRetriever:
    """`promptfed.types.Retriever` over the indices of several ``owners``.

    ``send``: queries leave as their vector or as their text; every owner that is asked sees them, and no other. With
    vectors all owners need the encoder of the asker. ``n_ask`` and ``coverage`` say how many owners a query is sent to
    (`retrieval.routing.chosen`); with neither, all. ``deadline_s`` bounds what the owners take for a search: what did
    not come by then is left out. Searches at the same time take turns, and each has its own deadline. ``merge`` is
    `by_score` for dense searches and `cori` for others. Of one owner come ``max_per_owner`` hits at most: scores are
    what the owners say, and one that lies about them would have all places. ``cross_encoder`` reads the best ``n_read``
    merged passages again (three for one that is wanted, by default) and orders them anew.

    Owners that share scores only have their hits named ``#NUMBER``, without a text; such hits are not read again by a
    cross-encoder, and stand after those that are.
    """

    def __init__(
        self,
        transport: Transport,
        owners: Sequence[str],
        encoder: Encoder,
        *,
        asker: str = "",
        send: QueryForm = "vector",
        mode: SearchMode = "dense",
        router: Router | None = None,
        n_ask: int | None = None,
        coverage: float | None = None,
        merge: Merge | None = None,
        cross_encoder: CrossEncoder | None = None,
        n_read: int | None = None,
        max_per_owner: int | None = None,
        deadline_s: float = 10.0,
    ) -> None:
        for name, value, known in (("send", send, get_args(QueryForm)), ("mode", mode, get_args(SearchMode))):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if send == "vector" and mode != "dense":
            raise ConfigError(f"a {mode} search needs the query's text: use send='text'")
        if n_ask is not None and n_ask < 1:
            raise ConfigError(f"n_ask = {n_ask}: expected 1 owner or more")
        if coverage is not None and not 0 < coverage <= 1:
            raise ConfigError(f"coverage = {coverage:g}: expected a probability above 0, at most 1")
        if max_per_owner is not None and max_per_owner < 1:
            raise ConfigError(f"max_per_owner = {max_per_owner}: expected 1 hit or more")
        self.owners = tuple(sorted(set(owners)))
        self._transport, self._encoder, self._asker = transport, encoder, asker
        self._send, self._mode = send, mode
        self._router = router or CentroidRouter()
        self._n_ask, self._coverage = n_ask, coverage
        self._merge, self._max_per_owner = merge or (by_score if mode == "dense" else cori), max_per_owner
        self._cross_encoder, self._n_read, self._deadline_s = cross_encoder, n_read, deadline_s
        self._described: dict[str, Described] = {}
        self._told_of: set[str] = set()  # encoders, and owners whose centroids are mostly noise
        self._rounds = itertools.count(1)
        self._n_silent: defaultdict[str, int] = defaultdict(int)  # exchanges in a row that it gave no answer to
        self._one_search = threading.Lock()  # of all threads, each of which may have a loop of its own

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return self.ask(queries, k).hits

    async def asearch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return (await self.aask(queries, k)).hits

    def ask(self, queries: Sequence[str], k: int) -> Answers:
        """As `aask`, blocking; notebook-safe."""
        return run_sync(self.aask(queries, k))

    async def aask(self, queries: Sequence[str], k: int) -> Answers:
        """At most ``k`` hits a query. No owner makes it fail: see `Answers`.

        Raises `CapabilityError` where none of the owners takes queries in the form that they are sent in.
        """
        check_k(k)
        queries = [whole(query) for query in queries]
        vectors = await asyncio.to_thread(self._encoder.encode, queries) if queries else np.zeros((0, 0))
        while not self._one_search.acquire(blocking=False):
            await asyncio.sleep(0.005)
        try:
            return await self._aask(queries, vectors, k)
        finally:
            self._one_search.release()

    async def described(self) -> dict[str, Described]:
        """What the owners say of their indices, asking those that have not said it yet."""
        missing = [owner for owner in self.owners if owner not in self._described]
        if missing:
            task = Describe(asker=self._asker)
            end = time.monotonic() + DESCRIBED_BY * self._deadline_s
            said, _ = await self._exchange(dict.fromkeys(missing, task), Described, end)
            self._described.update(said)
        return self._described

    async def route(self, queries: FloatArray) -> tuple[tuple[str, ...], FloatArray]:
        """The owners that have said what they are like, and how likely each holds what each of ``queries`` (n, d)
        looks for, (n, C). Owners without a centroid are as likely as the average."""
        described = await self.described()
        owners = tuple(owner for owner in self.owners if owner in described)
        sums = {o: s for o in owners if (s := self._centroid(o, queries.shape[1])) is not None}
        if self._coverage is not None or (self._n_ask is not None and self._n_ask < len(owners)):
            self._tell_of_noise(sums)
        out = np.full((len(queries), len(owners)), 1.0 / max(len(owners), 1))
        if sums:
            among = self._router.probabilities(queries, sums)
            out[:, [owners.index(o) for o in sums]] = among * len(sums) / len(owners)
        return owners, out

    def _centroid(self, owner: str, dimension: int) -> FloatArray | None:
        """Of a released centroid that can be compared with queries."""
        said = self._described[owner]
        if not said.centroid or said.encoder != self._encoder.encoder_id:
            return None
        try:
            return unpacked(said.centroid, dimension)
        except WireError as error:
            log.warning("the centroid of %s is left out: %s", owner, error)
            return None

    # ------------------------------------------------------------ the steps of a search

    async def _aask(self, queries: Sequence[str], vectors: FloatArray, k: int) -> Answers:
        start = time.monotonic()
        if not queries:
            return Answers(hits=[], asked=[])
        owners, weights = await self.route(vectors)
        unfit = self._unfit(owners)
        fit = np.array([owner not in unfit for owner in owners], dtype=np.bool_)
        owners, weights = tuple(o for o in owners if o not in unfit), weights[:, fit]
        asked = chosen(weights, n_ask=self._n_ask, coverage=self._coverage)
        shares = {owner: self._described[owner].shares for owner in owners}
        sizes = {owner: int(n) for owner, n in zip(owners, asked.sum(axis=0), strict=True) if n}
        wanted = self._n_wanted(k)
        n_each = min(math.ceil((1 + MORE) * wanted) + SPARE, MAX_HITS)
        if self._merge is by_score and self._cross_encoder is None:
            self._tell_of_encoders({self._described[owner].encoder for owner in sizes})
        tasks = {o: self._task(queries, vectors, asked[:, owners.index(o)], n_each) for o in sizes}
        found, silent = await self._exchange(tasks, Found, start + FOUND_BY * self._deadline_s, sizes)
        scores, passages = self._laid_out(owners, found, asked, n_each)
        hits, mute = await self._shown(shares, self._merge(scores, weights), passages, wanted, start + self._deadline_s)
        if self._cross_encoder is not None:
            read = self._cross_encoder
            hits = [await asyncio.to_thread(_reread, read, q, h) for q, h in zip(queries, hits, strict=True)]
        never = set(self.owners) - set(owners) - set(unfit)
        return Answers(
            hits=[mine[:k] for mine in hits],
            asked=[tuple(o for o, yes in zip(owners, row, strict=True) if yes) for row in asked.tolist()],
            silent=tuple(sorted({*silent, *mute, *never})),
            unfit=unfit,
        )

    def _tell_of_noise(self, sums: Mapping[str, FloatArray]) -> None:
        """An asker that leaves owners out by their centroids hears which of these say next to nothing of an index."""
        noisy = []
        for owner in sums.keys() - self._told_of:
            said, centroid = self._described[owner], sums[owner]
            # The square of a release's length is that of the sum, and on average d (multiplier x clip)^2 for the noise.
            noise = len(centroid) * (said.noise_multiplier * said.clip) ** 2
            if centroid @ centroid < 2 * noise:
                noisy.append(owner)
        self._told_of |= set(noisy)
        if noisy:
            log.warning(
                "the centroids of %d of %d owners (%s) are mostly noise (few documents, or a small epsilon), so which "
                "of them are asked is mostly chance: ask all owners (no n_ask, no coverage), or have the centroids "
                "released with more epsilon",
                len(noisy),
                len(self._described),
                ", ".join(sorted(noisy)[:5]) + (", ..." if len(noisy) > 5 else ""),
            )

    def _tell_of_encoders(self, encoders: set[str]) -> None:
        if len(encoders) > 1 and not encoders <= self._told_of:
            self._told_of |= encoders
            log.warning(
                "the owners' cosines are of different encoders (%s), and can't well be compared: let a cross_encoder, "
                "such as ReadAgain(encoder), read what they find again",
                ", ".join(sorted(encoders)),
            )

    def _n_wanted(self, k: int) -> int:
        if self._cross_encoder is None:
            return k
        return k * READ_AGAIN if self._n_read is None else max(self._n_read, k)

    def _unfit(self, owners: Sequence[str]) -> dict[str, str]:
        """Owners that could not read the query, or would show nothing for it, are told apart before they are sent
        it."""
        wrong = {}
        for owner in owners:
            said = self._described[owner]
            if said.shares == "nothing":
                wrong[owner] = "shares nothing with this asker"
            elif self._send not in said.accepts:
                wrong[owner] = f"takes {' or '.join(said.accepts)} only"
            elif self._send == "vector" and said.encoder != self._encoder.encoder_id:
                wrong[owner] = f"has encoder {said.encoder!r}"
        unread = {owner: why for owner, why in wrong.items() if self._described[owner].shares != "nothing"}
        if unread and len(wrong) == len(owners):
            first = ", ".join(f"{owner} {why}" for owner, why in sorted(unread.items())[:3])
            other = "text" if self._send == "vector" else "vector"
            raise CapabilityError(
                f"queries are sent as {self._send} (encoder {self._encoder.encoder_id!r}), which none of "
                f"{len(owners)} owners can use: {first}. Use send={other!r}"
            )
        for owner, why in wrong.items():
            log.warning("%s is not asked: it %s", owner, why)
            del self._described[owner]  # it may be another by the next search
        return wrong

    def _task(self, queries: Sequence[str], vectors: FloatArray, mine: BoolArray, k: int) -> Search:
        rows = np.flatnonzero(mine)
        if self._send == "text":
            return Search(asker=self._asker, k=k, mode=self._mode, texts=tuple(queries[i] for i in rows.tolist()))
        return Search(
            asker=self._asker,
            k=k,
            vectors=packed(vectors[rows]),
            dimension=vectors.shape[1],
            encoder=self._encoder.encoder_id,
        )

    def _laid_out(
        self, owners: Sequence[str], found: Mapping[str, Found], asked: BoolArray, k: int
    ) -> tuple[FloatArray, IntArray]:
        """Scores and passages, (n, C, k); -inf and -1 where there is no hit."""
        scores = np.full((len(asked), len(owners), k), -np.inf)
        passages = np.full(scores.shape, -1, dtype=np.int64)
        for i, owner in enumerate(owners):
            if owner in found:
                rows = np.flatnonzero(asked[:, i])
                mine, numbers = found[owner].arrays
                m = min(k, mine.shape[1])
                there = numbers[:, :m] >= 0
                if self._mode == "dense":
                    mine = np.clip(mine, -1.0, 1.0)  # a cosine is no more, whatever an owner says
                scores[rows, i, :m] = np.where(there, mine[:, :m], -np.inf)
                passages[rows, i, :m] = np.where(there, numbers[:, :m], -1)
        return scores, passages

    async def _shown(
        self, shares: Mapping[str, Share], merged: FloatArray, passages: IntArray, wanted: int, end: float
    ) -> tuple[list[list[Hit]], set[str]]:
        """The best ``wanted`` of all, with what their owners show of them, and the owners that did not show what they
        had found.

        More is asked for where doubles, or owners that fell silent, left a query with fewer than it should have.
        """
        owners = list(shares)
        if self._max_per_owner is not None:
            merged = _best_of_each(merged, self._max_per_owner + SPARE)
        flat, numbers = merged.reshape(len(merged), -1), passages.reshape(len(merged), -1)
        order = np.argsort(-flat, axis=1, kind="stable")
        n_there = np.isfinite(flat).sum(axis=1)
        shown: dict[tuple[int, int], Hit | None] = {}
        mute: set[str] = set()
        n_best = wanted + SPARE
        while True:
            best = [
                list(zip((row // merged.shape[2]).tolist(), of[row].tolist(), scores[row].tolist(), strict=True))
                for row, of, scores in zip(_cut(order, np.minimum(n_there, n_best)), numbers, flat, strict=True)
            ]
            need: defaultdict[str, list[int]] = defaultdict(list)
            for i, number, _ in itertools.chain.from_iterable(best):
                if (i, number) not in shown:
                    only_score = shares[owners[i]] not in ("snippets", "documents")
                    shown[i, number] = Hit(doc_id=f"#{number}", score=0.0, owner=owners[i]) if only_score else None
                    if not only_score and owners[i] not in mute:
                        need[owners[i]].append(number)
            tasks = {owner: Fetch(asker=self._asker, passages=tuple(of)) for owner, of in need.items()}
            sizes = {owner: len(task.passages) for owner, task in tasks.items()}
            now = time.monotonic()
            got, silent = await self._exchange(tasks, Shown, now + SHOWN_BY * (end - now), sizes)
            mute |= silent
            for owner, said in got.items():
                i = owners.index(owner)
                for number, doc_id, place, text in zip(
                    tasks[owner].passages, said.doc_ids, said.places, said.texts, strict=True
                ):
                    if doc_id:
                        shown[i, number] = Hit(doc_id=doc_id, passage=place, score=0.0, text=text, owner=owner)
            hits = [_distinct(candidates, shown, shares, self._max_per_owner)[:wanted] for candidates in best]
            if all(len(h) == wanted or n <= n_best for h, n in zip(hits, n_there.tolist(), strict=True)):
                break
            n_best *= 2
        return hits, mute

    async def _exchange(
        self,
        bodies: Mapping[str, TaskBody],
        kind: type[Body],
        end: float,
        sizes: Mapping[str, int] | None = None,
    ) -> tuple[dict[str, Body], set[str]]:
        """Ask owners at once: answers of ``kind``, for as many queries or passages as ``sizes`` says, and who gave
        none."""
        if not bodies or (left := end - time.monotonic()) <= 0:
            return {}, set(bodies)
        number = next(self._rounds)
        tasks = {
            owner: encode(
                Task(round=number, client_id=owner, run="retrieval", fleet="retrieval", grant=0, limit=0, body=body)
            )
            for owner, body in bodies.items()
        }
        awaited = [owner for owner in tasks if self._waits_for(owner)] or list(tasks)
        replies = await self._transport.exchange(tasks, awaited, left)
        out: dict[str, Body] = {}
        for owner, data in replies.items():
            try:
                reply = decode_reply(data)
            except WireError as error:
                log.warning("%s: %s", owner, error)
                continue
            fits = sizes is None or getattr(reply.body, "n", None) == sizes[owner]
            if isinstance(reply.body, kind) and fits and (reply.client_id, reply.round) == (owner, number):
                out[owner] = reply.body
            else:
                why = reply.body.reason if isinstance(reply.body, Failed) else "another answer than was asked for"
                log.warning("%s failed: %s", owner, why)
                self._described.pop(owner, None)  # it may be another by the next search
        for owner in bodies:
            self._n_silent[owner] = 0 if owner in out else self._n_silent[owner] + 1
        return out, set(bodies) - set(out)

    def _waits_for(self, owner: str) -> bool:
        """Owners that gave no answer are asked in every search, but hold up the second, fourth, eighth of them only."""
        n = self._n_silent[owner]
        return n & (n + 1) == 0


def _best_of_each(merged: FloatArray, n: int) -> FloatArray:
    """Scores (n queries, C, k) without all but the ``n`` best of each owner."""
    out = merged.copy()
    np.put_along_axis(out, np.argsort(-merged, axis=2, kind="stable")[:, :, n:], -np.inf, axis=2)
    return out


def _cut(order: IntArray, stops: IntArray) -> list[IntArray]:
    """The first so many of each row."""
    return [row[:stop] for row, stop in zip(order, stops.tolist(), strict=True)]


def _distinct(
    candidates: Sequence[tuple[int, int, float]],
    shown: Mapping[tuple[int, int], Hit | None],
    shares: Mapping[str, Share],
    max_per_owner: int | None,
) -> list[Hit]:
    """The hits there are, each passage once, and each text of those that are shown whole: the one with the best score.
    The beginnings of two passages may be alike, and they are two."""
    hits: list[Hit] = []
    seen: set[object] = set()
    n_of: defaultdict[str, int] = defaultdict(int)
    for i, number, score in candidates:
        hit = shown[i, number]
        if hit is None:
            continue
        names: set[object] = {(i, number)}
        if shares[hit.owner] == "documents":
            names.add(" ".join(hit.text.lower().split()))
        if not names & seen and (max_per_owner is None or n_of[hit.owner] < max_per_owner):
            seen |= names
            n_of[hit.owner] += 1
            hits.append(replace(hit, score=score))
    return hits


def _reread(cross_encoder: CrossEncoder, query: str, hits: Sequence[Hit]) -> list[Hit]:
    """In the order of the cross-encoder's scores; hits without a text after those, as they are."""
    with_text = [hit for hit in hits if hit.text]
    scores = cross_encoder.scores(query, [hit.text for hit in with_text]) if with_text else ()
    read = [replace(hit, score=float(score)) for hit, score in zip(with_text, scores, strict=True)]
    return [*sorted(read, key=lambda hit: -hit.score), *(hit for hit in hits if not hit.text)]
