"""A run whose clients are elsewhere: the server's side, over Flower. It sees what the codec sends, and no text."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from promptfed.conduct import Conductor, Result, task_text
from promptfed.config import Config, Network, load_config
from promptfed.errors import ConfigError, QuorumError
from promptfed.federation.checkpoint import Checkpoint
from promptfed.federation.events import Listener
from promptfed.federation.flower.settings import Attached, Listen
from promptfed.federation.flower.transport import FlowerTransport
from promptfed.federation.server import Limits, Server
from promptfed.files import write_whole
from promptfed.fm.base import run_sync
from promptfed.folder import new_folder
from promptfed.ledger import Phase
from promptfed.messages import Joined
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import content_hash
from promptfed.registry import load_method
from promptfed.strategies.base import Federation, Strategy
from promptfed.types import Encoder
from retrieval.federated import Answers, FederatedRetriever, check_k

# A round over a network has a deadline, said or not: a client that is gone for good must not stop a run.
DEADLINE_S = 1800.0
# A search waits no longer for clients that do not come: they look for their server again every few seconds.
SEARCH_WAIT_S = 60.0

log = logging.getLogger("promptfed.server")


def serve(
    config: Config | Path | str | Mapping[str, Any],
    *,
    out: Path | str,
    force: bool = False,
    listeners: Sequence[Listener] = (),
) -> Result:
    """Run the server of a federation whose clients connect to it, to its end. Blocking.

    ``out`` is the run folder to write; a run that was stopped or killed goes on with `promptfed.resume`.
    """
    checked = load_config(Path(config) if isinstance(config, str) else config)
    if checked.network is None:
        raise ConfigError("the configuration has no [network]; for a run in this process use promptfed run")
    listening(checked.network)
    with new_folder(Path(out), checked, force):
        return run_sync(NetworkRun(checked, Path(out), listeners).run())


def search(
    config: Config,
    queries: Sequence[str],
    k: int,
    *,
    encoder: Encoder,
    folder: Path | None = None,
    wait_s: float = SEARCH_WAIT_S,
    **options: Any,
) -> Answers:
    """Search the indices of the clients that connect to a server with this configuration. Blocking.

    It waits for all of them, ``wait_s`` at most, then asks those that are there. ``options`` are those of
    `FederatedRetriever`; ``folder`` is for Flower's own files, a temporary one by default. Raises `ConfigError` without
    a network, and `QuorumError` where no client comes in time.
    """
    if config.network is None:
        raise ConfigError("the configuration has no [network]: there is nobody to ask")
    network = config.network

    async def ask(place: Path) -> Answers:
        flower, ids = FlowerTransport(listening(network), place), sorted(network.clients)
        FederatedRetriever(flower, ids, encoder, **options)  # refuses its options before anybody waits
        check_k(k)
        async with flower:
            try:
                await flower.wait_for_clients(ids, wait_s)
            except QuorumError as error:
                if not flower.clients:
                    raise
                log.warning("%s", error)
            here = flower.clients & set(ids)
            answers = await FederatedRetriever(flower, sorted(here), encoder, **options).aask(queries, k)
            return replace(answers, silent=tuple(sorted({*answers.silent} | (set(ids) - here))))

    if folder is not None:
        return run_sync(ask(folder))
    with TemporaryDirectory(prefix="promptfed-") as temporary:
        return run_sync(ask(Path(temporary)))


def listening(network: Network) -> Listen | Attached:
    """Where and how clients connect. Raises `ConfigError` for files and options that don't go together."""
    keys = dict(network.clients) if isinstance(network.clients, dict) else {}
    if network.attached:
        return Attached(clients=keys, insecure=network.insecure)
    return Listen(
        address=network.listen,
        certificate=network.certificate,
        private_key=network.private_key,
        clients=keys,
        insecure=network.insecure,
    )


class NetworkRun(Conductor):
    """One run over a network. Its id, which clients file it under, is drawn when it begins and kept in its folder."""

    transport = "Flower"

    def __init__(self, config: Config, folder: Path, listeners: Sequence[Listener] = ()) -> None:
        if config.network is None:
            raise ConfigError(f"{folder} is not a run over a network (no [network])")
        method = load_method(config.method.name, config.method.options)
        super().__init__(config, task_text(config, config.task.labels), method, folder, listeners)
        self._network = config.network
        self._flower = FlowerTransport(listening(config.network), folder / "flower")
        kept = folder / "run_id"
        if not kept.exists():
            write_whole(kept, secrets.token_hex(6) + "\n")
        self._run_id = kept.read_text(encoding="ascii").strip()
        self._folder = folder
        self._fm_id = self._encoder_id = ""

    async def run(self) -> Result:
        """Wait for the clients, then the whole run. One that had ended is gone through once more, without them."""
        if (self._folder / "summary.json").exists():
            return await self.conduct(self._start)
        async with self._flower:
            place = (
                f"its app at {self._flower.socket}" if self._network.attached else f"clients at {self._network.listen}"
            )
            log.info("waiting for %s: %s", place, ", ".join(self.client_ids))
            await self._wait()
            return await self.conduct(self._start)

    @property
    def _start(self) -> dict[str, Any]:
        return {"data": content_hash(self.task.public)}

    async def _wait(self) -> None:
        """Until all clients are here, or the time is up and enough of them are."""
        ids = self.client_ids
        try:
            await self._flower.wait_for_clients(ids, self._network.wait_s)
        except QuorumError:
            if len(self._flower.clients & set(ids)) < self.limits.needed(len(ids)):
                raise
            log.info("going on without %s", ", ".join(sorted(set(ids) - self._flower.clients)))

    @property
    def client_ids(self) -> list[str]:
        return sorted(self._network.clients)

    @property
    def fm_id(self) -> str:
        return self._fm_id

    @property
    def encoder_id(self) -> str:
        return self._encoder_id

    @property
    def limits(self) -> Limits:
        limits = super().limits
        return limits if limits.deadline_s is not None else replace(limits, deadline_s=DEADLINE_S)

    def check_joined(self, joined: Mapping[str, Joined]) -> None:
        super().check_joined(joined)
        self._fm_id, self._encoder_id = next(((j.fm, j.encoder) for j in joined.values()), ("", ""))

    def open(self, fleet: str) -> Server:
        checkpoint = Checkpoint(self._folder / "checkpoint" / fleet)
        server = Server(
            self._flower,
            self.ledger,
            self.events,
            checkpoint,
            self.limits,
            run=self._run_id,
            fleet=fleet,
            sizes=self.sizes,
        )
        server.expect_absent(set(self.client_ids) - self._flower.clients)
        return server

    async def centralised(self, method: Strategy, federation: Federation, phase: Phase) -> tuple[Server, PromptSet]:  # noqa: ARG002
        raise ConfigError("centralised: over a network texts can't be put in one place")
