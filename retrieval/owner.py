"""The owner's side of federated retrieval: an index behind a policy, asked with messages.

What leaves is scores, and what the policy lets the asker see of passages that were found for it. A vector of a document
never leaves; the sum of all of them does, clipped and with noise, if the owner gives it out for routing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from promptfed.errors import ConfigError, RunError, WireError
from promptfed.files import write_whole
from promptfed.ledger import Usage
from promptfed.messages import Failed, Reply, decode_task, encode
from promptfed.messages.methods import packed
from promptfed.messages.retrieval import Describe, Described, Fetch, Found, ReplyBody, Search, Share, Shown, TaskBody
from promptfed.privacy.accounting import in_all, noise_multiplier_for
from promptfed.privacy.secret import Secret
from retrieval.index import LocalIndex

# How many searches' passages an asker may still fetch.
REMEMBERED = 256
Form = Literal["text", "vector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What an owner lets askers see and ask.

    ``shares`` holds for all that ``askers`` does not name. ``accepts``: queries as texts, as vectors, or both.
    ``max_hits`` is the most passages a query gets. A snippet is a passage's first ``snippet_words`` words.

    A centroid is released with (``epsilon``, ``delta``) for each document, once, and again when the owner says so
    (`IndexOwner.release`), until all releases together would pass ``max_epsilon``. ``epsilon`` None: no centroid
    leaves. Infinite: it leaves without noise.
    """

    shares: Share = "snippets"
    askers: Mapping[str, Share] = field(default_factory=dict)
    accepts: tuple[Form, ...] = ("text", "vector")
    max_hits: int = 100
    snippet_words: int = 30
    epsilon: float | None = 8.0
    delta: float = 1e-5
    max_epsilon: float = 8.0

    def __post_init__(self) -> None:
        for asker, share in [("all", self.shares), *self.askers.items()]:
            if share not in get_args(Share):
                raise ConfigError(f"unknown share {share!r} for {asker}; known: {', '.join(get_args(Share))}")
        if not self.accepts or not set(self.accepts) <= set(get_args(Form)):
            raise ConfigError(f"accepts = {self.accepts!r}: expected 'text', 'vector' or both")

    def share_of(self, asker: str) -> Share:
        return self.askers.get(asker, self.shares)


class IndexOwner:
    """One organisation's index, as others may ask it: `handle` takes a task's bytes and gives the reply's.

    ``folder`` keeps what was released and the key of its noise; without one, they are this process's.
    """

    def __init__(
        self,
        owner_id: str,
        index: LocalIndex,
        policy: Policy | None = None,
        *,
        folder: Path | None = None,
        secret: Secret | None = None,
    ) -> None:
        self.owner_id, self.index, self.policy = owner_id, index, policy or Policy()
        self._folder = folder
        self._secret = secret
        self._releases: list[dict[str, float]] = []
        self._described: Described | None = None
        self._granted: dict[str, OrderedDict[bytes, frozenset[int]]] = {}
        # Not the loop's own threads: a loop that ends waits for those.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"index-{owner_id[:20]}")

    async def handle(self, data: bytes) -> bytes:
        """Never raises: what went wrong leaves as the name of a class."""
        number = 0
        try:
            task = decode_task(data)
            number = task.round
            if task.client_id != self.owner_id:
                raise WireError(f"a task for {task.client_id!r} reached {self.owner_id!r}")
            if not isinstance(task.body, TaskBody):
                raise WireError(f"an index can't do a task of kind {task.body.kind!r}")
            loop = asyncio.get_running_loop()
            body: ReplyBody | Failed = await loop.run_in_executor(self._threads, self.answer, task.body)
        except Exception as error:  # noqa: BLE001  (the boundary: no exception, and no text of one, may leave)
            body = Failed(reason=type(error).__name__)
        return encode(Reply(round=number, client_id=self.owner_id, usage=Usage(), body=body))

    def answer(self, task: TaskBody) -> ReplyBody:
        """Do one task. Raises `RunError` for what the policy does not allow."""
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
        if policy.epsilon is None:
            raise ConfigError(f"the policy of {self.owner_id!r} lets no centroid out (epsilon is None)")
        before = self.spent[0]
        if before + policy.epsilon > policy.max_epsilon and not math.isinf(policy.epsilon):
            raise RunError(
                f"another centroid of {self.owner_id!r} costs an epsilon of {policy.epsilon:g}; {before:g} of "
                f"max_epsilon = {policy.max_epsilon:g} are spent"
            )
        noise = noise_multiplier_for(policy.epsilon, policy.delta, n_compositions=1)
        vectors, ids = self.index.document_vectors()
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        total = (vectors / np.maximum(lengths, 1.0)).sum(axis=0, dtype=np.float64)
        if self._secret is None:
            self._secret = Secret.kept_in(self._folder)
        content = hashlib.sha256(np.ascontiguousarray(vectors).tobytes() + repr(ids).encode()).hexdigest()
        number = str(len(self._kept()))
        total += noise * self._secret.normals(len(total), "centroid", number, content)
        self._described = Described(
            encoder=self.index.encoder.encoder_id,
            shares=policy.shares,
            accepts=policy.accepts,
            centroid=packed(total),
            clip=1.0,
            noise_multiplier=noise,
            epsilon=policy.epsilon if noise else 0.0,
            delta=policy.delta if noise else 0.0,
        )
        self._keep()
        return self._described

    # ------------------------------------------------------------ tasks

    def _describe(self, task: Describe) -> Described:
        plain = Described(
            encoder=self.index.encoder.encoder_id,
            shares=self.policy.share_of(task.asker),
            accepts=self.policy.accepts,
        )
        if self.policy.epsilon is None or plain.shares == "nothing":
            return plain
        self._kept()
        released = self._described or self.release()
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
        self._grant(task.asker, rows.tobytes(), frozenset(np.unique(rows).tolist()))
        return Found.of(scores, rows)

    def _fetch(self, task: Fetch) -> Shown:
        share = self.policy.share_of(task.asker)
        granted = self._granted.get(task.asker, OrderedDict()).values()
        doc_ids, places, texts = [], [], []
        for row in task.passages:
            known = share in ("snippets", "documents") and any(row in rows for rows in granted)
            hit = self.index.find(row) if known else None
            doc_ids.append(hit.doc_id if hit else "")
            places.append(hit.passage if hit else 0)
            text = hit.text if hit else ""
            texts.append(text if share == "documents" else " ".join(text.split()[: self.policy.snippet_words]))
        return Shown(doc_ids=tuple(doc_ids), places=tuple(places), texts=tuple(texts))

    def _grant(self, asker: str, key: bytes, rows: frozenset[int]) -> None:
        mine = self._granted.setdefault(asker, OrderedDict())
        digest = hashlib.sha256(key).digest()
        mine[digest] = rows
        mine.move_to_end(digest)
        if len(mine) > REMEMBERED:
            mine.popitem(last=False)

    # ------------------------------------------------------------ what was released

    def _kept(self) -> list[dict[str, float]]:
        path = self._path
        if path is not None and not self._releases and path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            self._releases = record["releases"]
            last = record["last"]
            self._described = Described(
                **{**last, "accepts": tuple(last["accepts"]), "centroid": bytes.fromhex(last["centroid"])}
            )
        return self._releases

    def _keep(self) -> None:
        """Before it leaves: a process that is killed after that knows of it."""
        last = self._described
        if last is None:
            return
        self._releases.append({"epsilon": last.epsilon or math.inf, "delta": last.delta})
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            described = {name: getattr(last, name) for name in Described.__dataclass_fields__}
            record = {"releases": self._releases, "last": {**described, "centroid": last.centroid.hex()}}
            write_whole(self._path, json.dumps(record) + "\n")

    @property
    def _path(self) -> Path | None:
        return self._folder / "released.json" if self._folder is not None else None
