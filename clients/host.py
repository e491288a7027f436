"""A client on a machine of its own: reads its files once, loads its models once, and serves run after run.

What belongs to a run lies in ``folder/RUN``: the journal of FM answers, the history of tasks, calibration, domain
model, per-text results. A host that was killed goes on from there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from clients.client import Client
from clients.data import ClientData, Rows, assemble
from promptfed.errors import DataError, RunError, WireError
from promptfed.files import write_whole
from promptfed.fm.base import BaseFM
from promptfed.fm.decorators import Pooled, Retrying
from promptfed.fm.journal import RecordingFM
from promptfed.ledger import Usage
from promptfed.messages import Failed, Join, Reply, Task, decode_reply, decode_task, encode, retrieval
from promptfed.plugins import DOMAIN_MODELS, find
from promptfed.prompts.template import content_hash
from promptfed.types import Encoder
from retrieval.encoder import RememberingEncoder
from retrieval.owner import IndexOwner

log = logging.getLogger("promptfed.client")


class ClientHost:
    """One organisation: `handle` takes a task's bytes from any run and gives the reply's.

    ``owner`` answers what is asked of its index, which belongs to no run. ``train`` and ``test`` are rows as
    `clients.data.read_rows` gives them. Raises `DataError` for rows that no run could use.
    """

    def __init__(
        self,
        client_id: str,
        train: Rows,
        test: Rows,
        fm: BaseFM,
        encoder: Encoder,
        folder: Path,
        owner: IndexOwner | None = None,
        *,
        unlabelled: Sequence[str] = (),
        domain_model: str = "linear",
    ) -> None:
        self.client_id, self._owner = client_id, owner
        self._train, self._test = train, test
        self._unlabelled = [(client_id, text) for text in unlabelled]
        self._domain_model = domain_model
        find(DOMAIN_MODELS, "domain model", domain_model)
        self._fm, self._encoder, self._folder = fm, encoder, folder
        self._private = RememberingEncoder(encoder)
        # What must be the same when a run goes on: a journal of another model, say, would answer nothing.
        self._basis = {
            "client": client_id,
            "data": content_hash([train, test, *([list(unlabelled)] if unlabelled else [])]),
            "domain_model": domain_model,
            "fm": fm.fm_id,
            "encoder": encoder.encoder_id,
        }
        self._assembled(sorted({label for _, _, label in [*train, *test]}), 0)
        self._run = ""
        self._selves: dict[str, Client] = {}
        self._join: Join | None = None

    def warm_up(self) -> None:
        """Load the encoder, so that one that can't be loaded is told before the first task."""
        self._encoder.encode(["A text."])

    async def handle(self, data: bytes) -> bytes:
        """Never raises: what went wrong leaves as the name of a class, and is told to whoever runs the client."""
        number = 0
        try:
            task = decode_task(data)
            number = task.round
            if task.client_id != self.client_id:
                raise WireError(f"a task for {task.client_id!r} reached {self.client_id!r}")
            if isinstance(task.body, retrieval.TaskBody):
                if self._owner is None:
                    raise RunError("asked of an index, and this client has none")
                return await self._owner.handle(data)
            client = await self._self(task)
            reply = await client.handle(data)
            if isinstance(body := decode_reply(reply).body, Failed):
                log.error("round %d, %s: %s failed: %s", number, task.fleet, task.body.kind, body.reason)
                return reply
        except Exception as error:  # noqa: BLE001  (the boundary: no exception, and no text of one, may leave)
            # A text of ours names files, rows and columns; another library's might quote data.
            log.error("round %d failed: %s", number, error if isinstance(error, (DataError, RunError)) else type(error))
            failed = Failed(reason=type(error).__name__)
            return encode(Reply(round=number, client_id=self.client_id, usage=Usage(), body=failed))
        log.info("round %d, %s: %s", number, task.fleet, task.body.kind)
        return reply

    async def _self(self, task: Task) -> Client:
        """The client that ``task`` is for: of this run and fleet."""
        if task.run != self._run:
            self._enter(task)
        if task.fleet not in self._selves:
            self._selves[task.fleet] = await self._wake(task.run, task.fleet)
        return self._selves[task.fleet]

    def _enter(self, task: Task) -> None:
        """Begin a run that asks to be joined, or go on with one that was joined before."""
        kept = self._folder / task.run / "run.json"
        if isinstance(task.body, Join):
            # What the labels make of the data is checked before anything is written.
            self._assembled(task.body.labels, task.body.seed)
        if kept.exists():
            record = json.loads(kept.read_text(encoding="utf-8"))
            if changed := [name for name, value in self._basis.items() if record.get(name) != value]:
                raise DataError(
                    f"{', '.join(changed)} changed since run {task.run} was joined: start this client as it was then"
                )
            join = Join(labels=tuple(record["join"]["labels"]), seed=record["join"]["seed"])
        elif isinstance(task.body, Join):
            join = task.body
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, json.dumps({**self._basis, "join": asdict(join)}) + "\n")
        else:
            raise RunError(f"run {task.run} was never joined")
        self._run, self._selves, self._join = task.run, {}, join

    def _assembled(self, labels: Sequence[str], seed: int) -> ClientData:
        (data,) = assemble(self._train, self._test, labels, seed, unlabelled=self._unlabelled)
        return data

    async def _wake(self, run: str, fleet: str) -> Client:
        if self._join is None:
            raise RunError("no run was joined")
        data = self._assembled(self._join.labels, self._join.seed)
        folder = self._folder / run
        journal = RecordingFM(Retrying(self._fm), folder / f"journal-{fleet}.jsonl")
        client = Client(
            data,
            self._join.labels,
            Pooled(journal),
            self._private,
            public_encoder=RememberingEncoder(self._encoder),
            seed=self._join.seed,
            folder=folder,
            history=f"history/{fleet}",
            domain_model=self._domain_model,
        )
        with journal.only():
            await client.restore()
        return client
