"""Runs in this process: reads the data and puts the concrete classes of all four packages together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from clients.client import Client
from clients.data import ClientData, Labelled, Rows, assemble, read_rows, read_texts
from clients.partition import dirichlet
from promptfed.conduct import MANUAL_CALIBRATION_TEXTS, Conductor, Result, TaskText, task_text
from promptfed.config import Config, load_config
from promptfed.errors import ConfigError, DataError
from promptfed.federation.checkpoint import Checkpoint
from promptfed.federation.events import Listener
from promptfed.federation.inprocess import InProcessTransport
from promptfed.federation.server import Server
from promptfed.fm.base import BaseFM, run_sync
from promptfed.fm.decorators import Pooled, Retrying, Routed
from promptfed.fm.journal import RecordingFM
from promptfed.folder import begun_folder, check_folder, new_folder
from promptfed.ledger import Phase
from promptfed.plugins import DOMAIN_MODELS, find
from promptfed.privacy.secret import simulated_key
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate, content_hash
from promptfed.registry import load_fm, load_method
from promptfed.runs import compare_runs
from promptfed.strategies.base import Federation, Reading, Strategy
from promptfed.tables import records
from promptfed.types import Encoder
from retrieval.encoder import RememberingEncoder, load_encoder

# Tokens of a prompt with two short exemplars; for estimates only.
PROMPT_TOKENS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The data of a run, read and checked."""

    task: TaskText
    clients: tuple[ClientData, ...]

    @property
    def digest(self) -> str:
        """Of everything in it: a run resumes on the data that it began with."""
        return content_hash(
            [
                self.task.labels,
                self.task.words,
                self.task.public,
                [
                    [
                        d.client_id,
                        *((p.texts, p.labels.tolist() or p.answers) for p in (d.train, d.test)),
                        *([d.unlabelled] if d.unlabelled else []),
                    ]
                    for d in self.clients
                ],
            ]
        )


def run(
    config: Config | Path | str | Mapping[str, Any],
    *,
    out: Path | str | None = None,
    force: bool = False,
    listeners: Sequence[Listener] = (),
    fm: BaseFM | None = None,
    encoder: Encoder | None = None,
) -> Result:
    """Run a whole federation in this process (a simulation) and return its result. Blocking; notebook-safe.

    ``out`` is the run folder to write; an existing one is refused unless ``force``. A run that was stopped goes on with
    `resume`. ``fm`` and ``encoder`` replace the configured ones.
    """
    checked = load_config(Path(config) if isinstance(config, str) else config)
    if checked.network is not None:
        raise ConfigError("the configuration has [network]: use promptfed server here, promptfed client there")
    folder = Path(out) if out is not None else None
    if folder is None:
        return run_sync(Simulation(checked, read_inputs(checked), None, listeners, fm=fm, encoder=encoder).run())
    check_folder(folder, force)
    inputs = read_inputs(checked)
    with new_folder(folder, checked, force):
        return run_sync(Simulation(checked, inputs, folder, listeners, fm=fm, encoder=encoder).run())


def resume(
    folder: Path | str,
    *,
    listeners: Sequence[Listener] = (),
    fm: BaseFM | None = None,
    encoder: Encoder | None = None,
) -> Result:
    """Go on with a run that was stopped or killed, from its folder; to the same result as if it had not been.

    No FM call that was answered is made again. A run that had ended is gone through once more, which costs nothing. For
    a run over a network, this is the server; ``fm`` and ``encoder`` are then the clients' affair.
    """
    folder = Path(folder)
    with begun_folder(folder) as config:
        if config.network is not None:
            from promptfed.network import NetworkRun

            return run_sync(NetworkRun(config, folder, listeners).run())
        return run_sync(Simulation(config, read_inputs(config), folder, listeners, fm=fm, encoder=encoder).run())


def read_inputs(config: Config) -> Inputs:
    """Read every file that the configuration names. Raises `DataError` and `ConfigError`."""
    train, test = _read_labelled(config)
    if config.partition is not None:
        train, test = dirichlet([train, test], config.partition.clients, config.partition.alpha, config.seed)
    labels: tuple[str, ...] = ()
    if config.task.kind == "classification":
        labels = config.task.labels or tuple(sorted({label for _, _, label in train}))
        if not labels:
            raise DataError("no training text has a label to learn the task's labels from; give them in task.labels")
    if len(labels) == 1:
        raise DataError(f"the training data has one label only ({labels[0]!r}); give the others in task.labels")
    clients = assemble(
        train, test, labels, config.seed, unlabelled=_read_unlabelled(config), max_labels=config.data.max_labels
    )
    _check_kinds(config, {d.client_id for d in clients})
    return Inputs(task=task_text(config, labels), clients=tuple(clients))


def _read_labelled(config: Config) -> tuple[Rows, Rows]:
    data = config.data
    text_column, label_column = data.text_column, data.label_column
    if data.train is not None:
        # Data that is to be partitioned has no owner yet.
        owner = "all" if config.partition is not None else None
        columns = {"client_column": data.client_column, "text_column": text_column, "label_column": label_column}
        train = read_rows(data.train, client=owner, **columns)
        return train, read_rows(data.test, client=owner, **columns) if data.test else []
    columns = {"client_column": "", "text_column": text_column, "label_column": label_column}
    train = [row for c in config.clients if c.train for row in read_rows(c.train, client=c.id, **columns)]
    test = [row for c in config.clients if c.test for row in read_rows(c.test, client=c.id, **columns)]
    return train, test


def _read_unlabelled(config: Config) -> list[tuple[str, str]]:
    """Texts (client, text) without a label."""
    data = config.data
    if data.unlabelled is not None:
        rows = []
        for number, record in records(data.unlabelled, [data.client_column, data.text_column]):
            if not (owner := record[data.client_column].strip()):
                raise DataError(
                    f"{data.unlabelled}, row {number}: column {data.client_column!r} is empty; expected a client's name"
                )
            rows.append((owner, record[data.text_column]))
        return rows
    return [
        (c.id, text)
        for c in config.clients
        if c.unlabelled
        for text in read_texts(c.unlabelled, text_column=data.text_column)
    ]


def kinds_of(config: Config) -> dict[str, str]:
    """Which clients have a domain model of another kind than ``domain_model.kind``."""
    own = {c.id: c.domain_model for c in config.clients if c.domain_model is not None}
    return {**config.domain_model.by_client, **own}


def _check_kinds(config: Config, clients: set[str]) -> None:
    kinds = kinds_of(config)
    if strangers := sorted(set(kinds) - clients):
        raise ConfigError(f"domain_model.by_client has {strangers[0]!r}; the clients are {', '.join(sorted(clients))}")
    for kind in sorted({config.domain_model.kind, *kinds.values()}):
        find(DOMAIN_MODELS, "domain model", kind)


def estimate(config: Config) -> dict[str, Any]:
    """Calls, tokens, minutes and money of a run, from the data's lengths and the FM's speed on made-up text."""
    inputs = read_inputs(config)
    texts = [t for d in inputs.clients for t in (*d.train.texts, *d.test.texts)]
    n_tokens = int(np.mean([len(t) for t in texts]) / 4) + PROMPT_TOKENS
    fm = load_fm(config.fm.scorer, prices=config.fm.prices)
    sample = ["word " * max(1, n_tokens - PROMPT_TOKENS)] * 32
    requests = PromptTemplate(text="Text: {text}\nLabel:", words=inputs.task.words).requests(sample)
    run_sync(fm.complete(requests[:4]))
    start = perf_counter()
    answers = run_sync(fm.complete(requests))
    per_call = (perf_counter() - start) / len(sample)
    usd_a_call = sum(a.usd for a in answers) / len(sample)
    phases = {
        phase: {"fm_calls": n, "tokens": n * n_tokens, "minutes": n * per_call / 60, "usd": n * usd_a_call}
        for phase, n in _calls_by_phase(config, inputs).items()
    }
    basis = f"At {1 / per_call:.0f} calls a second ({fm.fm_id}) and about {n_tokens} tokens a call; " + (
        f"prices of {config.fm.prices.name}." if config.fm.prices else "without prices (fm.prices), money is 0."
    )
    return {"phases": phases, "basis": basis}


def _calls_by_phase(config: Config, inputs: Inputs) -> dict[str, int]:
    n_test = sum(len(d.test) for d in inputs.clients)
    budget, size = config.budget.max_fm_calls, config.method.max_prompts
    n_calibration = sum(min(MANUAL_CALIBRATION_TEXTS, len(d.train)) for d in inputs.clients if inputs.task.labels)
    cost = {
        "zero_shot": n_test,
        "manual_few_shot": n_test + n_calibration,
        **dict.fromkeys(("dm_fedavg", "dm_fedprox", "dm_fedadam", "dm_ensemble"), 0),
        "local_only": budget + size * n_test,
        "centralised": budget + size * n_test,
    }
    baselines = sum(cost[name] for name in config.evaluation.baselines) if n_test else 0
    # Other prompts at each milestone. A client that chooses others than the tuned set asks with those too.
    evaluation = size * n_test * (1 + len(config.budget.milestones))
    extra = config.distillation.max_fm_calls + config.cascade.max_fm_calls
    transfer = {"transfer": extra} if extra else {}
    return {"tuning": budget, **transfer, "evaluation": evaluation, "baselines": baselines}


class Simulation(Conductor):
    """One run, in one process. Clients are objects; what they exchange is serialised all the same."""

    transport = "in-process simulation"
    has_secrets = False

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        folder: Path | None,
        listeners: Sequence[Listener] = (),
        *,
        fm: BaseFM | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        method = load_method(config.method.name, config.method.options)
        super().__init__(config, inputs.task, method, folder, listeners)
        self.inputs = inputs
        more = {"prices": config.fm.prices, "cache": config.fm.cache}
        scorer = fm or load_fm(config.fm.scorer, **more)
        proposer = load_fm(config.fm.proposer, **more) if config.fm.proposer else scorer
        self.fm = scorer if proposer is scorer else Routed(scorer, proposer)
        self.fm_in_process = self.fm.in_process
        if config.budget.max_usd is not None and not self.fm.is_priced:
            raise ConfigError("budget.max_usd needs to know what tokens cost: name a file in fm.prices (docs/fm.md)")
        for capability in sorted(self.needs):
            self.fm.require(capability, f"method {method.name!r}")
        self._shared_encoder = encoder or load_encoder(config.encoder.name)
        self._journals: dict[str, RecordingFM] = {}
        self._encoders = {d.client_id: RememberingEncoder(self._shared_encoder) for d in inputs.clients}

    async def run(self) -> Result:
        """The whole run."""
        self._shared_encoder.encode(["A text."])  # an encoder that can't be loaded stops the run here, by name
        expected = sum(_calls_by_phase(self.config, self.inputs).values())
        return await self.conduct({"expected_fm_calls": expected, "fm": self.fm_id, "data": self.inputs.digest})

    @property
    def client_ids(self) -> list[str]:
        return sorted(d.client_id for d in self.inputs.clients)

    @property
    def fm_id(self) -> str:
        return self.fm.fm_id

    @property
    def encoder_id(self) -> str:
        return self._shared_encoder.encoder_id

    def open(self, fleet: str) -> Server:
        server, _ = self._open(fleet, self._clients(self.inputs.clients, fleet))
        return server

    async def centralised(self, method: Strategy, federation: Federation, phase: Phase) -> tuple[Server, PromptSet]:
        """All texts in one place, the same number of calls; then each client calibrates on its own texts' scores."""
        pooled, rows = _pool([d for d in self.inputs.clients if d.client_id in federation.clients])
        centre = self._clients([pooled], "centralised-tuning")
        server, restore = self._open("centralised-tuning", centre)

        def read(reading: Reading) -> None:
            """The texts [0, stop) of all are each client's first so many."""
            stops = {c: int((mine < reading.stop).sum()) for c, mine in rows.items()}
            federation.read(replace(reading, by_client={c: replace(reading, stop=n) for c, n in stops.items()}))

        central = replace(federation, clients={pooled.client_id: len(pooled.train)}, read=read)
        prompt = await self.tune(server, method, central, phase)
        await restore()
        clients = self._clients(self.inputs.clients, "centralised")
        for client_id in rows:
            clients[client_id].scores.adopt(centre[pooled.client_id].scores, rows[client_id])
        return self._open("centralised", clients)[0], prompt

    def compare(self) -> dict[str, Any]:
        if self.folder is None:
            return {}
        return {
            arm: asdict(compare_runs([self.folder], [self.folder], "fm", arm, measured.keys()))
            for arm, measured in self.shared_arms().items()
        }

    def _clients(self, data: Sequence[ClientData], fleet: str) -> dict[str, Client]:
        """Clients of one fleet. As they share a provider they share its journal of answers, keyed by hash: a batch is
        in it as a whole or not at all."""
        provider: BaseFM = Retrying(self.fm)
        if self.folder is not None:
            # Scores of single texts, if by hash: beside what belongs to the clients.
            provider = self._journals[fleet] = RecordingFM(provider, self.folder / "clients" / f"journal-{fleet}.jsonl")
        provider = Pooled(provider)
        public_encoder = RememberingEncoder(self._shared_encoder)
        clients: dict[str, Client] = {}
        real = set(map(id, self.inputs.clients))  # and not the pooled one of `centralised`
        for d in data:
            is_real = id(d) in real
            encoder = self._encoders[d.client_id] if is_real else RememberingEncoder(self._shared_encoder)
            own = ("clients", d.client_id) if is_real else ("checkpoint", fleet)
            if fleet == "local_only":  # each reads other texts than the others: see `restore`
                public_encoder = RememberingEncoder(self._shared_encoder)
            clients[d.client_id] = Client(
                d,
                self.task.labels,
                provider,
                encoder,
                public_encoder=public_encoder,
                seed=self.config.seed,
                folder=self.folder.joinpath(*own) if self.folder else None,
                history=f"history/{fleet}",
                noise_key=simulated_key(self.config.seed, d.client_id),
                domain_model=kinds_of(self.config).get(d.client_id, self.config.domain_model.kind),
            )
        return clients

    def _open(self, fleet: str, clients: Mapping[str, Client]) -> tuple[Server, Callable[[], Awaitable[None]]]:
        journal = self._journals.get(fleet)

        async def restore() -> None:
            """Clients remember before anybody is asked, so that batches hold what they held; no call is made."""
            with journal.only() if journal is not None else nullcontext():
                await asyncio.gather(*(client.restore() for client in clients.values()))

        checkpoint = Checkpoint(self.folder / "checkpoint" / fleet if self.folder else None)
        transport = InProcessTransport(clients, restore)
        return Server(
            transport, self.ledger, self.events, checkpoint, self.limits, fleet=fleet, sizes=self.sizes
        ), restore


def _pool(clients: Sequence[ClientData]) -> tuple[ClientData, dict[str, Any]]:
    """One client that holds everybody's training texts, taken in turns; and where each client's texts went."""
    places = sorted((i / len(d.train), c, i) for c, d in enumerate(clients) for i in range(len(d.train)))
    of, is_labelled = [d.train for d in clients], any(d.train.labels.size for d in clients)
    train = Labelled(
        texts=tuple(of[c].texts[i] for _, c, i in places),
        labels=np.array([of[c].labels[i] for _, c, i in places if is_labelled], dtype=np.int64),
        answers=tuple(of[c].answers[i] for _, c, i in places if not is_labelled),
    )
    rows = {d.client_id: np.zeros(len(d.train), dtype=np.int64) for d in clients}
    for row, (_, c, i) in enumerate(places):
        rows[clients[c].client_id][i] = row
    empty = Labelled(texts=(), labels=np.zeros(0, dtype=np.int64))
    return ClientData(client_id="all clients", train=train, test=empty), rows
