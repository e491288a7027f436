"""Puts the parts together: the only module that knows the concrete classes of all four packages."""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from clients.client import Client
from clients.data import ClientData, Labelled, Rows, assemble, read_rows, read_texts
from clients.partition import dirichlet
from evaluators.metrics import PRIMARY
from promptfed.config import Config, dump_toml, load_config
from promptfed.errors import ConfigError, DataError, UserError
from promptfed.federation.checkpoint import Checkpoint
from promptfed.federation.evaluation import adopt, evaluate, fedavg_heads, join, summarise
from promptfed.federation.events import EventLog, Listener
from promptfed.federation.inprocess import InProcessTransport
from promptfed.federation.server import Limits, Server
from promptfed.files import write_whole
from promptfed.fm.base import BaseFM, run_sync
from promptfed.fm.decorators import Pooled, Retrying, Routed
from promptfed.fm.journal import RecordingFM
from promptfed.ledger import Ledger
from promptfed.messages import Evaluate, Evaluated, Joined
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import content_hash
from promptfed.registry import load_fm, load_method
from promptfed.report.build import build_report
from promptfed.runs import compare_runs
from promptfed.strategies.base import Federation, Strategy
from promptfed.strategies.baselines import Given, manual_prompt, zero_shot_prompt
from promptfed.types import Encoder
from retrieval.encoder import RememberingEncoder, SentenceEncoder

SCHEMA_VERSION = 1
# The arms that every run measures, in this order: those that share prompts share FM calls.
TUNED_ARMS = ("fm", "fm_pooled", "fm_single", "fm_dm", "dm_local")
# Texts a client that calibrate the hand-written prompt: as many as the tuned prompts typically get.
MANUAL_CALIBRATION_TEXTS = 60
# Tokens of a prompt with two short exemplars; for estimates only.
PROMPT_TOKENS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to. ``summary`` is summary.json; ``folder`` is None for a run that was not kept."""

    prompt: PromptSet
    summary: Mapping[str, Any]
    folder: Path | None

    def score(self, arm: str = "fm", metric: str = PRIMARY) -> float:
        """Mean over clients of ``metric`` for ``arm``, on held-out texts."""
        return float(self.summary["metrics"][metric][arm]["mean"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The data of a run, read and checked."""

    labels: tuple[str, ...]
    words: tuple[str, ...]
    clients: tuple[ClientData, ...]
    public: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of everything in it: a run resumes on the data that it began with."""
        return content_hash(
            [
                self.labels,
                self.words,
                self.public,
                [
                    [d.client_id, *((part.texts, part.labels.tolist()) for part in (d.train, d.test))]
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
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_folder(folder, force)
    inputs = read_inputs(checked)
    if folder is None:
        return run_sync(Simulation(checked, inputs, None, listeners, fm=fm, encoder=encoder).run())
    replaced = _begin(folder, checked)
    with claimed(folder):
        spent = False
        try:
            simulation = Simulation(checked, inputs, folder, listeners, fm=fm, encoder=encoder)
            try:
                return run_sync(simulation.run())
            finally:
                spent = simulation.ledger.total("tuning").fm_calls > 0
        except UserError:
            # Nothing was paid for yet: leave no folder behind, and the one that was to be replaced where it was.
            if not spent:
                shutil.rmtree(folder, ignore_errors=True)
                if replaced.exists():
                    replaced.replace(folder)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


def _begin(folder: Path, config: Config) -> Path:
    """Make a run folder, with its configuration or not at all; returns where the one that it replaces was put."""
    replaced, scratch = (folder.with_name(f".{folder.name}.{what}") for what in ("replaced", "new"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write_whole(scratch / "config.toml", dump_toml(config))
    if folder.exists():
        with claimed(folder):
            shutil.rmtree(replaced, ignore_errors=True)
            folder.replace(replaced)
    scratch.replace(folder)
    return replaced


def resume(
    folder: Path | str,
    *,
    listeners: Sequence[Listener] = (),
    fm: BaseFM | None = None,
    encoder: Encoder | None = None,
) -> Result:
    """Go on with a run that was stopped or killed, from its folder; to the same result as if it had not been.

    No FM call that was answered is made again. A run that had ended is gone through once more, which costs nothing.
    """
    folder = Path(folder)
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} is not a run folder (no config.toml); give the folder of a run that was stopped")
    config = load_config(folder / "config.toml")
    with claimed(folder):
        simulation = Simulation(config, read_inputs(config), folder, listeners, fm=fm, encoder=encoder)
        return run_sync(simulation.run())


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from working on ``folder``; the claim ends with the process. Raises `ConfigError`."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is working on {folder}; wait for it, or stop it first") from None
        yield


def check_folder(out: Path, force: bool) -> None:
    """Raises `ConfigError` if ``out`` exists and ``force`` is off; with it, only a run folder may be replaced."""
    if not out.exists():
        return
    if not force:
        raise ConfigError(
            f"{out} exists; choose another folder, give --force to replace it, or go on with promptfed resume {out}"
        )
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.toml").is_file()):
        raise ConfigError(f"{out} is not a run folder (no config.toml); --force would delete it, so choose another")


def read_inputs(config: Config) -> Inputs:
    """Read every file that the configuration names. Raises `DataError` and `ConfigError`."""
    train, test = _read_labelled(config)
    if config.partition is not None:
        train, test = dirichlet([train, test], config.partition.clients, config.partition.alpha, config.seed)
    labels = config.task.labels or tuple(sorted({label for _, _, label in train}))
    if len(labels) < 2:
        raise DataError(f"the training data has one label only ({labels[0]!r}); give the others in task.labels")
    unknown = sorted(set(config.task.verbalizer) - set(labels))
    if unknown:
        raise ConfigError(f"task.verbalizer has {', '.join(unknown)}; the labels are {', '.join(labels)}")
    words = tuple(config.task.verbalizer.get(label, label) for label in labels)
    public = read_texts(config.data.public, text_column=config.data.text_column) if config.data.public else []
    clients = assemble(train, test, labels, config.seed)
    return Inputs(labels=labels, words=words, clients=tuple(clients), public=tuple(public))


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
    train = [row for c in config.clients for row in read_rows(c.train, client=c.id, **columns)]
    test = [row for c in config.clients if c.test for row in read_rows(c.test, client=c.id, **columns)]
    return train, test


def estimate(config: Config) -> dict[str, Any]:
    """Calls, tokens, minutes and money of a run, from the data's lengths and the FM's speed on made-up text."""
    inputs = read_inputs(config)
    texts = [t for d in inputs.clients for t in (*d.train.texts, *d.test.texts)]
    n_tokens = int(np.mean([len(t) for t in texts]) / 4) + PROMPT_TOKENS
    fm = load_fm(config.fm.scorer)
    sample = ["word " * max(1, n_tokens - PROMPT_TOKENS)] * 32
    fm.score_labels("Text: {text}\nLabel:", sample[:4], list(inputs.words))
    start = perf_counter()
    fm.score_labels("Text: {text}\nLabel:", sample, list(inputs.words))
    per_call = (perf_counter() - start) / len(sample)
    phases = {
        phase: {"fm_calls": n, "tokens": n * n_tokens, "minutes": n * per_call / 60, "usd": 0.0}
        for phase, n in _calls_by_phase(config, inputs).items()
    }
    basis = (
        f"At {1 / per_call:.0f} calls a second ({fm.fm_id}) and about {n_tokens} tokens a call; "
        "an embedded FM costs nothing but time."
    )
    return {"phases": phases, "basis": basis}


def _calls_by_phase(config: Config, inputs: Inputs) -> dict[str, int]:
    n_test = sum(len(d.test) for d in inputs.clients)
    budget, size = config.budget.max_fm_calls, config.method.max_prompts
    cost = {
        "zero_shot": n_test,
        "manual_few_shot": n_test + sum(min(MANUAL_CALIBRATION_TEXTS, len(d.train)) for d in inputs.clients),
        "dm_fedavg": 0,
        "local_only": budget + size * n_test,
        "centralised": budget + size * n_test,
    }
    baselines = sum(cost[name] for name in config.evaluation.baselines) if n_test else 0
    return {"tuning": budget, "evaluation": size * n_test, "baselines": baselines}


@dataclass(slots=True)
class Fleet:
    """Clients and the server that reaches them."""

    clients: dict[str, Client]
    server: Server
    restore: Callable[[], Awaitable[None]]

    @property
    def ids(self) -> list[str]:
        return sorted(self.clients)


class Simulation:
    """One run, in one process. Clients are objects; what they exchange is serialised all the same."""

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
        self.config, self.inputs, self.folder = config, inputs, folder
        self.method: Strategy = load_method(config.method.name)
        scorer = fm or load_fm(config.fm.scorer)
        proposer = load_fm(config.fm.proposer) if config.fm.proposer else scorer
        self.fm = scorer if proposer is scorer else Routed(scorer, proposer)
        for capability in sorted(self.method.needs):
            self.fm.require(capability, f"method {self.method.name!r}")
        shared = encoder or SentenceEncoder(config.encoder.name)
        self.encoder_id = shared.encoder_id
        self._encoders = {d.client_id: RememberingEncoder(shared) for d in inputs.clients}
        self._shared_encoder = shared
        self.ledger = Ledger()
        self.events = EventLog(folder / "events.jsonl" if folder else None, tuple(listeners))
        self._arms: dict[str, dict[str, Evaluated]] = {}

    async def run(self) -> Result:
        """Tune, adopt, evaluate, compare with the baselines, write the run folder."""
        self._shared_encoder.encode(["A text."])  # an encoder that can't be loaded stops the run here, by name
        fleet = self._fleet(self.inputs.clients, "tuning")
        self.events.add(
            "start",
            {
                "method": self.method.name,
                "seed": self.config.seed,
                "clients": fleet.ids,
                "max_fm_calls": self.config.budget.max_fm_calls,
                "expected_fm_calls": sum(_calls_by_phase(self.config, self.inputs).values()),
                "fm": self.fm.fm_id,
                "data": self.inputs.digest,
                "transport": "in-process simulation",
            },
        )
        joined = await fleet.server.drive(join(fleet.ids), "tuning", 0)
        n_test = {c: j.n_test for c, j in joined.items()}
        federation = self._federation(n_train := {c: j.n_train for c, j in sorted(joined.items())})

        def welcome(client: str, newcomer: Joined) -> None:
            n_train[client], n_test[client] = newcomer.n_train, newcomer.n_test
            joined[client] = newcomer

        self._check_budget(federation, any(n_test.values()))
        fleet.server.invite(set(fleet.ids) - set(joined), welcome)
        prompt = await self._tune(fleet, self.method, federation)
        await fleet.server.drive(adopt(list(federation.clients), prompt), "tuning", 0)
        if any(n_test.values()):
            single = await self._tune(fleet, Given(prompt.prompts[:1]), replace(federation, max_fm_calls=0))
            await self._evaluate(fleet, prompt, single, n_test)
            await self._baselines(federation, n_test)
        return self._finish(prompt, sum(j.n_dropped for j in joined.values()))

    # -------------------------------------------------------------------------------------------- parts of a run

    def _check_budget(self, federation: Federation, is_measured: bool) -> None:
        """Let the method refuse a budget before anything is paid for, also the share of one client alone."""
        next(self.method.run(replace(federation, log=_silent)), None)
        if is_measured and "local_only" in self.config.evaluation.baselines:
            try:
                next(self.method.run(_alone(federation, next(iter(federation.clients)))), None)
            except ConfigError as error:
                raise ConfigError(
                    f"evaluation.baselines has local_only, where each client has its share of the calls: {error}, "
                    "times the number of clients, or leave the baseline out"
                ) from None

    async def _tune(self, fleet: Fleet, method: Strategy, federation: Federation, phase: Any = "tuning") -> PromptSet:
        return await fleet.server.drive(method.run(federation), phase, federation.max_fm_calls)

    async def _evaluate(self, fleet: Fleet, prompt: PromptSet, single: PromptSet, n_test: Mapping[str, int]) -> None:
        for arm in TUNED_ARMS:
            used = single if arm == "fm_single" else prompt
            task = Evaluate(arm=arm, prompt=None if arm == "dm_local" else used)
            await self._measure(fleet, dict.fromkeys(fleet.ids, task), n_test, "evaluation")

    async def _measure(
        self, fleet: Fleet, tasks: Mapping[str, Evaluate], n_test: Mapping[str, int], phase: Any
    ) -> None:
        arm = next(iter(tasks.values())).arm
        measured = await fleet.server.drive(evaluate(tasks, n_test), phase, 10**9)
        self._arms.setdefault(arm, {}).update(measured)
        self.events.add(
            "arm", {"arm": arm, PRIMARY: float(np.mean([e.values[PRIMARY] for e in self._arms[arm].values()]))}
        )

    async def _baselines(self, federation: Federation, n_test: Mapping[str, int]) -> None:
        for name in self.config.evaluation.baselines:
            fleet = self._fleet(self.inputs.clients, name)
            if name == "zero_shot":
                raw = _raw(federation, zero_shot_prompt(federation))
                await self._measure(
                    fleet, dict.fromkeys(fleet.ids, Evaluate(arm=name, prompt=raw)), n_test, "baselines"
                )
            elif name == "manual_few_shot":
                by_hand = manual_prompt(federation, self.config.evaluation.manual_prompt)
                n_calls = MANUAL_CALIBRATION_TEXTS * len(fleet.ids)
                given = Given([by_hand], MANUAL_CALIBRATION_TEXTS)
                tuned = await self._tune(fleet, given, replace(federation, max_fm_calls=n_calls), "baselines")
                for arm in (name, f"{name}_calibrated"):
                    tasks = dict.fromkeys(fleet.ids, Evaluate(arm=arm, prompt=tuned))
                    await self._measure(fleet, tasks, n_test, "baselines")
            elif name == "dm_fedavg":
                head = await fleet.server.drive(fedavg_heads(list(federation.clients)), "baselines", 0)
                await self._measure(fleet, dict.fromkeys(fleet.ids, Evaluate(arm=name, head=head)), n_test, "baselines")
            elif name == "local_only":
                await self._local_only(fleet, federation, n_test)
            else:
                await self._centralised(fleet, federation, n_test)

    async def _local_only(self, fleet: Fleet, federation: Federation, n_test: Mapping[str, int]) -> None:
        """Each client alone, with its share of the calls."""
        tasks = {}
        for client in self._arms["fm"]:  # who is gone, or has no held-out texts, is not measured
            alone = _alone(federation, client)
            tasks[client] = Evaluate(arm="local_only", prompt=await self._tune(fleet, self.method, alone, "baselines"))
        await self._measure(fleet, tasks, n_test, "baselines")

    async def _centralised(self, fleet: Fleet, federation: Federation, n_test: Mapping[str, int]) -> None:
        """All texts in one place, the same number of calls; then each client calibrates on its own texts' scores."""
        pooled, rows = _pool([d for d in self.inputs.clients if d.client_id in federation.clients])
        centre = self._fleet([pooled], "centralised-tuning")
        central = replace(federation, clients={pooled.client_id: len(pooled.train)}, log=_silent)
        prompt = await self._tune(centre, self.method, central, "baselines")
        await centre.restore()
        for client_id in rows:
            fleet.clients[client_id].scores.adopt(centre.clients[pooled.client_id].scores, rows[client_id])
        await self._measure(
            fleet, dict.fromkeys(fleet.ids, Evaluate(arm="centralised", prompt=prompt)), n_test, "baselines"
        )

    # -------------------------------------------------------------------------------------------- wiring

    def _fleet(self, data: Sequence[ClientData], name: str) -> Fleet:
        """Clients of one phase or baseline, with a checkpoint of their own. As they share a provider they share its
        journal of answers, keyed by hash: a batch is in it as a whole or not at all."""
        provider: BaseFM = Retrying(self.fm)
        journal = None
        folder = self.folder / "checkpoint" / name if self.folder else None
        if self.folder is not None:
            # Scores of single texts, if by hash: beside what belongs to the clients.
            provider = journal = RecordingFM(provider, self.folder / "clients" / f"journal-{name}.jsonl")
        provider = Pooled(provider)
        public_encoder = RememberingEncoder(self._shared_encoder)
        clients: dict[str, Client] = {}
        real = set(map(id, self.inputs.clients))  # and not the pooled one of `centralised`
        for d in data:
            is_real = id(d) in real
            own = self.folder / "clients" / d.client_id if self.folder and is_real else folder
            if name == "local_only":  # each reads other texts than the others: see `restore`
                public_encoder = RememberingEncoder(self._shared_encoder)
            clients[d.client_id] = Client(
                d,
                self.inputs.labels,
                provider,
                self._encoders[d.client_id] if is_real else RememberingEncoder(self._shared_encoder),
                public_encoder=public_encoder,
                seed=self.config.seed,
                folder=own,
                history=f"history/{name}",
            )
        budget, rounds = self.config.budget, self.config.rounds
        limits = Limits(
            max_tokens=budget.max_tokens, max_usd=budget.max_usd, deadline_s=rounds.deadline_s, quorum=rounds.quorum
        )

        async def restore() -> None:
            """Clients remember before anybody is asked, so that batches hold what they held; no call is made."""
            with journal.only() if journal is not None else nullcontext():
                await asyncio.gather(*(client.restore() for client in clients.values()))

        transport = InProcessTransport(clients, restore)
        server = Server(transport, self.ledger, self.events, Checkpoint(folder), limits)
        return Fleet(clients, server, restore)

    def _federation(self, n_train: Mapping[str, int]) -> Federation:
        config = self.config
        return Federation(
            clients=n_train,
            labels=self.inputs.labels,
            words=self.inputs.words,
            instruction=config.task.instruction,
            public=self.inputs.public,
            max_fm_calls=config.budget.max_fm_calls,
            max_prompts=config.method.max_prompts,
            seed=config.seed,
            log=self.events.add,
        )

    def _in_both(self) -> dict[str, dict[str, Evaluated]]:
        """Of every other arm, what the clients gave for it that were measured on the tuned prompt too."""
        tuned = self._arms.get("fm", {})
        both = {a: {c: e for c, e in m.items() if c in tuned} for a, m in self._arms.items() if a != "fm"}
        return {arm: measured for arm, measured in both.items() if measured}

    def _finish(self, prompt: PromptSet, n_dropped: int) -> Result:
        config = self.config
        summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "method": self.method.name,
            "seed": config.seed,
            "fm": self.fm.fm_id,
            "encoder": self.encoder_id,
            "transport": "in-process simulation",
            "n_clients": len(self.inputs.clients),
            "labels": list(self.inputs.labels),
            "prompt_id": prompt.prompt_id,
            "primary_metric": PRIMARY,
            "metrics": summarise(self._arms),
            "calls_per_prediction": {
                arm: float(np.mean([e.calls_per_prediction for e in by_client.values()]))
                for arm, by_client in self._arms.items()
            },
            "max_fm_calls": config.budget.max_fm_calls,
            "n_dropped_texts": n_dropped,
            "ledger": self.ledger.as_dict(),
            "privacy": {"releases": []},
        }
        self.events.add("end", {"prompt_id": prompt.prompt_id})
        if self.folder is not None:
            prompt.save(
                self.folder / "prompt.json",
                about={"method": self.method.name, "seed": config.seed, "fm": self.fm.fm_id},
            )
            summary["comparisons"] = {
                arm: asdict(compare_runs([self.folder], [self.folder], "fm", arm, measured.keys()))
                for arm, measured in self._in_both().items()
            }
            text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
            write_whole(self.folder / "summary.json", text)
            build_report(self.folder)
        return Result(prompt=prompt, summary=summary, folder=self.folder)


def _alone(federation: Federation, client: str) -> Federation:
    """One client of a federation, with its share of the calls."""
    share = federation.max_fm_calls // len(federation.clients)
    return replace(federation, clients={client: federation.clients[client]}, max_fm_calls=share, log=_silent)


def _silent(_kind: str, _data: Mapping[str, Any]) -> None:
    """A method that runs as a baseline tells the event log nothing of its own."""


def _raw(federation: Federation, prompt: Any) -> PromptSet:
    """A single prompt as it is, without calibration."""
    return PromptSet(labels=federation.labels, prompts=(prompt,), weights=(1.0,), bias=(0.0,) * len(federation.labels))


def _pool(clients: Sequence[ClientData]) -> tuple[ClientData, dict[str, Any]]:
    """One client that holds everybody's training texts, taken in turns; and where each client's texts went."""
    places = sorted((i / len(d.train), c, i) for c, d in enumerate(clients) for i in range(len(d.train)))
    texts = tuple(clients[c].train.texts[i] for _, c, i in places)
    labels = np.array([clients[c].train.labels[i] for _, c, i in places])
    rows = {d.client_id: np.zeros(len(d.train), dtype=np.int64) for d in clients}
    for row, (_, c, i) in enumerate(places):
        rows[clients[c].client_id][i] = row
    empty = Labelled(texts=(), labels=np.zeros(0, dtype=np.int64))
    return ClientData(client_id="all clients", train=Labelled(texts=texts, labels=labels), test=empty), rows
