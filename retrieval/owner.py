"""The owner's side of federated retrieval: an index behind a policy, asked with messages.

What leaves is scores, and what the policy lets the asker see of passages that were found for it. The sum of all
documents' vectors leaves too, clipped and with noise, if the owner gives it out for routing. A vector of one document
is in no message; but scores are cosines, and who may send many queries of its own making can work vectors out from
them: let those ask who would be trusted with that.

Who asks is what the task says. Over a network the federation's server sends the tasks, and vouches for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import secrets
import threading
import time
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from promptfed.errors import ConfigError, DataError, PromptfedError, RunError, WireError
from promptfed.files import write_whole
from promptfed.ledger import Usage
from promptfed.messages import Failed, Reply, decode_task, encode
from promptfed.messages.methods import packed
from promptfed.messages.retrieval import Describe, Described, Fetch, Found, ReplyBody, Search, Share, Shown, TaskBody
from promptfed.privacy.accounting import in_all, noise_multiplier_for
from promptfed.privacy.secret import Secret
from promptfed.types import IntArray, QueryForm
from retrieval.documents import passages
from retrieval.index import LocalIndex

log = logging.getLogger("promptfed.retrieval")

# How many searches' passages an asker may still fetch, and of how many askers that is remembered.
REMEMBERED, ASKERS = 256, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What an owner lets askers see and ask.

    ``shares`` holds for all that ``askers`` does not name. ``accepts``: queries as texts, as vectors, or both.
    ``max_hits`` is the most passages a query gets. A snippet is a passage's first ``snippet_words`` words. With
    ``hourly_queries``, an asker that ``askers`` names may send so many at once, and so many an hour after that, and all
    others so many together, whatever they call themselves: who may send any number can work vectors out from their
    scores.

    A centroid is released with (``epsilon``, ``delta``) for each document, once, and again when the owner says so
    (`IndexOwner.release`), until all releases together would pass ``max_epsilon``. ``epsilon`` None: no centroid
    leaves. Infinite: it leaves without noise.
    """

    shares: Share = "snippets"
    askers: Mapping[str, Share] = field(default_factory=dict)
    accepts: tuple[QueryForm, ...] = ("text", "vector")
    max_hits: int = 100
    snippet_words: int = 30
    hourly_queries: int | None = None
    epsilon: float | None = 8.0
    delta: float = 1e-5
    max_epsilon: float = 8.0

    def __post_init__(self) -> None:
        for asker, share in [("all", self.shares), *self.askers.items()]:
            if share not in get_args(Share):
                raise ConfigError(f"unknown share {share!r} for {asker}; known: {', '.join(get_args(Share))}")
        if not self.accepts or not set(self.accepts) <= set(get_args(QueryForm)):
            raise ConfigError(f"accepts = {self.accepts!r}: expected 'text', 'vector' or both")
        for name in ("max_hits", "snippet_words", "hourly_queries"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} = {value}: expected 1 or more")
        if self.epsilon is not None and not (self.epsilon > 0 and 0 < self.delta < 1):
            raise ConfigError(
                f"epsilon = {self.epsilon:g}, delta = {self.delta:g}: expected more than 0, and a delta below 1; "
                "with epsilon None no centroid leaves"
            )
        if self.epsilon is not None and math.isfinite(self.epsilon) and not self.epsilon <= self.max_epsilon:
            raise ConfigError(
                f"epsilon = {self.epsilon:g} is more than max_epsilon = {self.max_epsilon:g}: no centroid could leave"
            )

    def share_of(self, asker: str) -> Share:
        return self.askers.get(asker, self.shares)


class IndexOwner:
    """One organisation's index, as others may ask it: `handle` takes a task's bytes and gives the reply's.

    ``folder`` keeps what was released and the key of its noise; without one, they are this process's. ``clock`` counts
    seconds.
    """

    def __init__(
        self,
        owner_id: str,
        index: LocalIndex,
        policy: Policy | None = None,
        *,
        folder: Path | None = None,
        secret: Secret | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.owner_id, self.index, self.policy = owner_id, index, policy or Policy()
        self._folder = folder
        self._secret = secret
        self._releases: list[dict[str, Any]] = []
        self._described: Described | None = None
        # By asker, the latest first to go: the passages of its last searches by the numbers that it was given.
        self._granted: OrderedDict[str, deque[dict[int, int]]] = OrderedDict()
        # By asker that the policy names, and "" for all others: how many queries were left, and when that was.
        self._left: dict[str, tuple[float, float]] = {}
        self._clock = clock
        self._numbers = np.random.default_rng(secrets.randbits(128))
        self._lock = threading.RLock()
        # Not the loop's own threads: a loop that ends waits for those.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"index-{owner_id[:20]}")

    async def handle(self, data: bytes) -> bytes:
        """Never raises: what went wrong leaves as the name of a class."""
        number = 0

        def reply(body: ReplyBody | Failed) -> bytes:
            return encode(Reply(round=number, client_id=self.owner_id, usage=Usage(), body=body))

        try:
            task = decode_task(data)
            number = task.round
            if task.client_id != self.owner_id:
                raise WireError(f"a task for {task.client_id!r} reached {self.owner_id!r}")
            if not isinstance(task.body, TaskBody):
                raise WireError(f"an index can't do a task of kind {task.body.kind!r}")
            loop = asyncio.get_running_loop()
            return reply(await loop.run_in_executor(self._threads, self.answer, task.body))
        except Exception as error:  # noqa: BLE001  (the boundary: no exception, and no text of one, may leave)
            # A text of ours names files and settings; another library's might quote a query or a document.
            log.error(
                "%s: a task failed: %s", self.owner_id, error if isinstance(error, PromptfedError) else type(error)
            )
            return reply(Failed(reason=type(error).__name__))

    def answer(self, task: TaskBody) -> ReplyBody:
        """Do one task, from the index as it was last saved. Raises `RunError` for what the policy does not allow."""
        self._reopen()
        match task:
            case Describe():
                return self._describe(task)
            case Search():
                return self._search(task)
            case Fetch():
                return self._fetch(task)

    @property
    def spent(self) -> tuple[float, float]:
        """(epsilon, delta) of all that was released about any one document, by basic composition."""
        return in_all((release["epsilon"], release["delta"]) for release in self._kept())

    def release(self) -> Described:
        """Make a new centroid from the index as it is, which is paid for. Raises `ConfigError` where the policy has no
        centroid leave, and `RunError` where it would pass ``max_epsilon``."""
        policy = self.policy
        self._reopen()
        if policy.epsilon is None:
            raise ConfigError(f"the policy of {self.owner_id!r} lets no centroid out (epsilon is None)")
        with self._lock:
            before = self.spent[0]
            if before + policy.epsilon > policy.max_epsilon and math.isfinite(policy.epsilon):
                raise RunError(
                    f"another centroid of {self.owner_id!r} costs an epsilon of {policy.epsilon:g}; {before:g} of "
                    f"max_epsilon = {policy.max_epsilon:g} are spent"
                )
            noise = noise_multiplier_for(policy.epsilon, policy.delta, n_compositions=1)
            self.index.check_encoder()
            vectors, ids = self.index.document_vectors()
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            total = (vectors / np.maximum(lengths, 1.0)).sum(axis=0, dtype=np.float64)
            if self._secret is None:
                self._secret = Secret.kept_in(self._folder)
            content = hashlib.sha256(np.ascontiguousarray(vectors).tobytes() + repr(ids).encode()).hexdigest()
            # Other noise for each release, and for each scale of it: two sums under the same noise at two scales, as a
            # lost ledger would lead to, would give the sum itself away.
            purpose = ("centroid", str(len(self._kept())), content, repr((policy.epsilon, policy.delta, noise)))
            total += noise * self._secret.normals(len(total), *purpose)
            made = Described(
                encoder=self.index.encoder.encoder_id,
                shares=policy.shares,
                accepts=policy.accepts,
                centroid=packed(total),
                clip=1.0,
                noise_multiplier=noise,
                epsilon=policy.epsilon if noise else 0.0,
                delta=policy.delta if noise else 0.0,
            )
            self._keep(made)
            return made

    def prepare(self, *, renew: bool = False) -> None:
        """Make the first centroid, if there is to be one, before anybody waits for it: to find how much noise it takes
        costs a second. With ``renew``, make another where the one that was released is not given out any more, or is of
        other documents; without, tell the owner. Raises as `release`, and `ConfigError` for another encoder than the
        index was made with."""
        self._reopen()
        self.index.check_encoder()
        shared = {self.policy.shares, *self.policy.askers.values()} - {"nothing"}
        if self.policy.epsilon is None or not shared:
            return
        with self._lock:
            releases = self._kept()
            why = "" if self._described is None else self._withheld(self._described)
            if not why and releases and releases[-1]["documents"] not in ("", self.index.fingerprint):
                why = "its documents have changed since its centroid was released"
            if self._described is None or (renew and why):
                self.release()
            elif why:
                log.warning("%s: %s", self.owner_id, why)

    def _reopen(self) -> None:
        """What was deleted from the index meanwhile, by another process, is found no more."""
        with self._lock:
            index = self.index.reopened()
            if index is not self.index:
                log.info("%s: the index was changed, and is opened anew: %d documents", self.owner_id, len(index))
                self.index = index
                self._granted.clear()  # the numbers of passages may mean others now

    # ------------------------------------------------------------ tasks

    def _describe(self, task: Describe) -> Described:
        plain = Described(
            encoder=self.index.encoder.encoder_id,
            shares=self.policy.share_of(task.asker),
            accepts=self.policy.accepts,
        )
        if self.policy.epsilon is None or plain.shares == "nothing":
            return plain
        with self._lock:
            self._kept()
            released = self._described or self.release()
        if why := self._withheld(released):
            log.warning("%s: %s", self.owner_id, why)
            return plain
        return replace(released, shares=plain.shares, accepts=plain.accepts)

    def _search(self, task: Search) -> Found:
        n, vectors = len(task.texts), None
        if task.vectors:
            vectors = np.frombuffer(task.vectors, dtype="<f4").reshape(-1, max(task.dimension, 1))
            n = len(vectors)
        share = self.policy.share_of(task.asker)
        k = min(task.k, self.policy.max_hits)
        if share == "nothing":
            return Found.of(np.full((n, 0), -np.inf), np.zeros((n, 0), dtype=np.int64))
        self._count(task.asker, n)
        if (form := "text" if vectors is None else "vector") not in self.policy.accepts:
            raise RunError(f"queries come as {form} here, and the policy takes {', '.join(self.policy.accepts)}")
        if vectors is None:
            found = self.index.search_rows(task.texts, k, task.mode)
            scores, rows = np.full((n, k), -np.inf), np.full((n, k), -1, dtype=np.int64)
            for i, hits in enumerate(found):
                for j, (score, row) in enumerate(hits):
                    scores[i, j], rows[i, j] = score, row
        else:
            if task.encoder != self.index.encoder.encoder_id:
                raise RunError(f"vectors by {task.encoder!r} can't be compared with {self.index.encoder.encoder_id!r}")
            if task.mode != "dense":
                raise RunError(f"a {task.mode} search needs the query's text")
            scores, rows = self.index.search_vectors(vectors, k)
        return Found.of(scores, self._numbered(task.asker, rows))

    def _count(self, asker: str, n: int) -> None:
        """Take ``n`` queries off what ``asker`` may still send (a token bucket)."""
        limit = self.policy.hourly_queries
        if limit is None:
            return
        now, who = self._clock(), asker if asker in self.policy.askers else ""
        left, since = self._left.get(who, (float(limit), now))
        left = min(left + (now - since) * limit / 3600, limit)
        enough = n <= left
        self._left[who] = (left - n if enough else left, now)
        if not enough:
            raise RunError(f"{n} queries at once of an asker with {int(left)} left; hourly_queries = {limit}")

    def _fetch(self, task: Fetch) -> Shown:
        share = self.policy.share_of(task.asker)
        granted = ChainMap(*self._granted.get(task.asker, ()))
        doc_ids, places, texts = [], [], []
        for number in task.passages:
            known = share in ("snippets", "documents") and number in granted
            hit = self.index.find(granted[number]) if known else None
            doc_ids.append(hit.doc_id if hit else "")
            places.append(hit.passage if hit else 0)
            text = hit.text if hit else ""
            texts.append(text if share == "documents" else self._snippet(text))
        return Shown(doc_ids=tuple(doc_ids), places=tuple(places), texts=tuple(texts))

    def _snippet(self, text: str) -> str:
        start, stop = next(passages(text, self.policy.snippet_words, 0), (0, 0))
        return " ".join(text[start:stop].split())

    def _numbered(self, asker: str, rows: IntArray) -> IntArray:
        """The passages ``rows`` under numbers that say nothing of them; -1 stays. The asker may fetch them now."""
        distinct = np.unique(rows[rows >= 0])
        numbers = np.unique(self._numbers.integers(2**62, size=2 * len(distinct) + 8))
        numbers = self._numbers.permutation(numbers)[: len(distinct)]
        mine = self._granted.setdefault(asker, deque(maxlen=REMEMBERED))
        mine.appendleft(dict(zip(numbers.tolist(), distinct.tolist(), strict=True)))
        self._granted.move_to_end(asker)
        if len(self._granted) > ASKERS:
            self._granted.popitem(last=False)
        out = np.full(rows.shape, -1, dtype=np.int64)
        there = rows >= 0
        out[there] = numbers[np.searchsorted(distinct, rows[there])]
        return out

    # ------------------------------------------------------------ what was released

    def _withheld(self, released: Described) -> str:
        """Why what was released is not given out any more; nothing where it is."""
        until = "no centroid is given out before another release"
        if released.encoder != (now := self.index.encoder.encoder_id):
            return f"its centroid is of encoder {released.encoder}, the index of {now}: {until}"
        epsilon, policy = released.epsilon or math.inf, self.policy
        if policy.epsilon is not None and (epsilon > policy.epsilon or released.delta > policy.delta):
            asked = f"an epsilon of {policy.epsilon:g} and a delta of {policy.delta:g}"
            return f"its centroid has an epsilon of {epsilon:g}, and the policy asks for {asked} at most: {until}"
        return ""

    def _kept(self) -> list[dict[str, Any]]:
        path = self._path
        if path is not None and not self._releases and path.exists():
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                last = record["last"]
                described = Described(
                    **{**last, "accepts": tuple(last["accepts"]), "centroid": bytes.fromhex(last["centroid"])}
                )
                releases = [
                    {"epsilon": float(r["epsilon"]), "delta": float(r["delta"]), "documents": r.get("documents", "")}
                    for r in record["releases"]
                ]
                if not releases:
                    raise ValueError("a centroid that nothing was paid for")
                self._described, self._releases = described, releases
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path}: what was released of this index can't be read ({type(error).__name__}); restore the file "
                    "from a copy. Without it, what another centroid costs is not known"
                ) from None
        return self._releases

    def _keep(self, made: Described) -> None:
        """On the disk before it is known to anybody: what was not written was not released."""
        paid = {"epsilon": made.epsilon or math.inf, "delta": made.delta, "documents": self.index.fingerprint}
        releases = [*self._kept(), paid]
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            described = {name: getattr(made, name) for name in Described.__dataclass_fields__}
            record = {"releases": releases, "last": {**described, "centroid": made.centroid.hex()}}
            write_whole(self._path, json.dumps(record) + "\n")
        self._releases, self._described = releases, made

    @property
    def _path(self) -> Path | None:
        return self._folder / "released.json" if self._folder is not None else None
