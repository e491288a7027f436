"""The steps of a run, whatever carries its messages: join, tune, adopt, measure, compare with the baselines, write.

`promptfed.app.Simulation` conducts clients that are objects in this process, `promptfed.network.NetworkRun` those that
are elsewhere. Both give a `Server` for each fleet: the clients once more, with a memory of their own, for each phase.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, get_args

import numpy as np

from clients.data import read_texts
from evaluators import answers, metrics
from promptfed.config import Config
from promptfed.errors import CapabilityError, ConfigError, RunError, UserError
from promptfed.federation.averaging import Rule, averaged, ensemble
from promptfed.federation.cascade import fit_cascade, least_texts, realised
from promptfed.federation.evaluation import adopt, evaluate, fit_stack, join, offers, summarise
from promptfed.federation.events import EventLog, Listener
from promptfed.federation.server import Limits, Server
from promptfed.files import write_whole
from promptfed.fm.base import lacking
from promptfed.ledger import Ledger, Phase
from promptfed.messages import Cascade, Evaluate, Evaluated, Join, Joined, Offer
from promptfed.prompts.artefact import PromptSet
from promptfed.registry import methods_for
from promptfed.report.build import build_report
from promptfed.strategies.base import Federation, Reading, Strategy, needs_of
from promptfed.strategies.baselines import (
    Centralised,
    ManualFewShot,
    as_it_is,
    each_alone,
    manual_prompt,
    zero_shot_prompt,
)
from promptfed.strategies.distillation import Teacher
from promptfed.types import SoftSpace, satisfies

SCHEMA_VERSION = 1
TUNING: Final = "tuning"
# The arms that every run measures, in this order: those that share prompts share FM calls.
TUNED_ARMS = ("fm", "fm_pooled", "fm_single", "fm_personal", "fm_dm", "dm_local")
READ_ARMS = ("fm", "fm_pooled", "fm_single", "fm_single_pooled", "fm_personal")
AVERAGES: Mapping[str, Rule] = {f"dm_{rule}": rule for rule in get_args(Rule)}
# Without labels nothing is calibrated, and there are no domain models.
ANSWER_ARMS = ("fm", "fm_single")
# Texts a client that calibrate the hand-written prompt: as many as the tuned prompts typically get.
MANUAL_CALIBRATION_TEXTS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to. ``summary`` is summary.json; ``folder`` is None for a run that was not kept."""

    prompt: PromptSet
    summary: Mapping[str, Any]
    folder: Path | None

    def score(self, arm: str = "fm", metric: str | None = None) -> float:
        """Mean over clients of ``metric`` (the task's primary one by default) for ``arm``, on held-out texts."""
        return float(self.summary["metrics"][metric or self.summary["primary_metric"]][arm]["mean"])


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskText:
    """What the server knows of the task: labels, the words shown for them, and public texts."""

    labels: tuple[str, ...]
    words: tuple[str, ...]
    public: tuple[str, ...]


def task_text(config: Config, labels: tuple[str, ...]) -> TaskText:
    """What ``config`` says of a task with ``labels``; reads the public texts. Raises `ConfigError` and `DataError`."""
    unknown = sorted(set(config.task.verbalizer) - set(labels))
    if unknown:
        raise ConfigError(f"task.verbalizer has {', '.join(unknown)}; the labels are {', '.join(labels)}")
    words = tuple(config.task.verbalizer.get(label, label) for label in labels)
    public = read_texts(config.data.public, text_column=config.data.text_column) if config.data.public else []
    return TaskText(labels=labels, words=words, public=tuple(public))


class Conductor(ABC):
    """One run. ``fm_id`` and ``encoder_id`` are for the books: the server asks no model."""

    transport: ClassVar[str]
    # Whether the clients' texts stayed in this process when the FM was asked; None where each client has its own FM.
    fm_in_process: bool | None = None
    # Whether clients draw their noise from keys that nobody else knows.
    has_secrets: ClassVar[bool] = True

    def __init__(
        self, config: Config, task: TaskText, method: Strategy, folder: Path | None, listeners: Sequence[Listener]
    ) -> None:
        self.config, self.task, self.method, self.folder = config, task, method, folder
        self.sizes: dict[str, int] = {}  # of clients, in texts
        kind = config.task.kind
        if kind not in method.card.kinds:
            raise ConfigError(
                f"method {method.name!r} can't do task.kind = {kind!r}; these can: {', '.join(methods_for(kind))}"
            )
        self.needs = needs_of(method, kind)
        self._metrics, self._primary = (
            (tuple(metrics.METRICS), metrics.PRIMARY) if task.labels else (tuple(answers.METRICS), answers.PRIMARY)
        )
        self.ledger = Ledger()
        self.events = EventLog(folder / "events.jsonl" if folder else None, tuple(listeners))
        self._arms: dict[str, dict[str, Evaluated]] = {}
        self._readings: list[tuple[Reading, dict[str, Any]]] = []
        self._kinds: dict[str, str] = {}
        self._choices: dict[str, int] = {}
        self._alone_releases: list[Mapping[str, Any]] = []

    # ------------------------------------------------------------------------------- what a transport has to give

    @property
    @abstractmethod
    def client_ids(self) -> list[str]:
        """Everybody who is expected to join, sorted."""

    @property
    @abstractmethod
    def fm_id(self) -> str: ...

    @property
    @abstractmethod
    def encoder_id(self) -> str: ...

    @abstractmethod
    def open(self, fleet: str) -> Server:
        """A server for the clients of ``fleet``, with a checkpoint of its own."""

    @abstractmethod
    async def centralised(self, method: Strategy, federation: Federation, phase: Phase) -> tuple[Server, PromptSet]:
        """Tune with all texts in one place; a server of clients that remember their own texts' scores, and the prompt.

        Raises `ConfigError` where texts can't be put in one place.
        """

    @property
    def join_task(self) -> Join:
        """What every client is told when it joins."""
        return Join(labels=self.task.labels, seed=self.config.seed)

    def check_joined(self, joined: Mapping[str, Joined]) -> None:
        """Raises `ConfigError` unless all clients ask the same model, and `CapabilityError` if it can't do the task."""
        for what, name in (("foundation models", "fm"), ("encoders", "encoder")):
            kinds = {str(getattr(j, name)): c for c, j in sorted(joined.items(), reverse=True)}
            if len(kinds) > 1:
                told = ", ".join(f"{c}: {kind}" for kind, c in sorted(kinds.items()))
                raise ConfigError(f"the clients use different {what} ({told}); all have to use the same")
        unpriced = [c for c, j in sorted(joined.items()) if not j.is_priced]
        if self.config.budget.max_usd is not None and unpriced:
            raise ConfigError(
                f"budget.max_usd needs to know what tokens cost, and client {unpriced[0]!r} does not say it: promptfed "
                "client --prices (docs/fm.md)"
            )
        for c, j in sorted(joined.items()):
            for capability in sorted(self.needs):
                if not satisfies(j.capabilities, capability):
                    whose = f"that of client {c!r}, {j.fm},"
                    raise CapabilityError(lacking(f"method {self.method.name!r}", capability, whose, j.capabilities))

    def compare(self) -> dict[str, Any]:
        """``{arm: comparison}`` of the tuned prompt with every other arm, where per-text results are at hand."""
        return {}

    # ------------------------------------------------------------------------------------------- parts of a run

    @property
    def limits(self) -> Limits:
        budget, rounds = self.config.budget, self.config.rounds
        return Limits(
            max_tokens=budget.max_tokens, max_usd=budget.max_usd, deadline_s=rounds.deadline_s, quorum=rounds.quorum
        )

    async def conduct(self, start: Mapping[str, Any]) -> Result:
        """Tune, adopt, evaluate, compare with the baselines, write the run folder. ``start`` is logged first."""
        ids = self.client_ids
        server = self.open(TUNING)
        self.events.add(
            "start",
            {
                "method": self.method.name,
                "seed": self.config.seed,
                "clients": ids,
                "max_fm_calls": self.config.budget.max_fm_calls,
                **start,
                "transport": self.transport,
            },
        )
        joined = await server.drive(join(ids, self.join_task), "tuning", 0)
        self.check_joined(joined)
        n_test = {c: j.n_test for c, j in joined.items()}
        n_train = {c: j.n_train for c, j in sorted(joined.items())}
        n_unlabelled = {c: j.n_unlabelled for c, j in sorted(joined.items())}
        self._kinds = {c: j.domain_model for c, j in sorted(joined.items())}
        federation = self._federation(n_train, n_unlabelled, next(iter(joined.values())).soft_space)
        if without := [c for c, n in n_train.items() if not n]:
            self.events.add("without_labels", {"clients": without})

        def welcome(client: str, newcomer: Joined) -> None:
            try:
                self.check_joined({**joined, client: newcomer})
            except UserError as error:
                # Not a reason to stop the others, who have paid by now.
                self.events.add("turned_away", {"client": client, "why": str(error)})
                return
            n_train[client], n_test[client] = newcomer.n_train, newcomer.n_test
            n_unlabelled[client], self._kinds[client] = newcomer.n_unlabelled, newcomer.domain_model
            joined[client] = newcomer

        self._check_budget(federation, any(n_test.values()))
        server.invite(set(ids) - set(joined), self.join_task, welcome)
        if isinstance(self.method, Centralised):
            server, prompt = await self.centralised(self.method.method, federation, TUNING)
        else:
            prompt = await self.tune(server, self.method, federation)
        if not self._readings:
            raise RunError(f"method {self.method.name!r} came to an end without a reading: it has to end with conclude")
        reading = self._readings[-1][0]
        prompts = {c: reading.of(c).prompt for c in federation.clients}
        teaching = self.config.distillation
        if teaching.max_fm_calls:
            teacher = Teacher(temperature=teaching.temperature, min_confidence=teaching.min_confidence, spends_all=True)
            singles = {c: reading.of(c).single for c in federation.clients}  # three times the texts for as many calls
            lesson = teacher.distil(federation, singles, teaching.max_fm_calls)
            await server.drive(lesson, "transfer", teaching.max_fm_calls)
        stack = (1.0, 0.0)
        if federation.labels:
            stack = await server.drive(fit_stack(prompts), "tuning", 0)
        offered = await server.drive(offers(federation, reading), "tuning", 0)
        cascades: dict[str, Cascade] = {}
        cascading = self.config.cascade
        if cascading.target_risk is not None:
            cascades = await server.drive(
                fit_cascade(federation, reading, stack, cascading.target_risk, cascading.max_fm_calls),
                "transfer",
                cascading.max_fm_calls,
            )
        self._choices = await server.drive(adopt(prompts, stack, offered, cascades), "tuning", 0)
        self._save(prompt)
        if any(n_test.values()):
            await self._evaluate(server, reading, offered, stack, cascades, n_test)
            await self._evaluate_readings(server, federation, n_test)
            await self._baselines(federation, n_test)
        return self._finish(prompt, stack, joined)

    async def tune(self, server: Server, method: Strategy, federation: Federation, phase: Phase = TUNING) -> PromptSet:
        """Drive ``method`` to its end."""
        return await server.drive(method.run(federation), phase, federation.max_fm_calls)

    def _check_budget(self, federation: Federation, is_measured: bool) -> None:
        """Let the method refuse a budget before anything is paid for, also the share of one client alone."""
        next(self.method.run(unread(federation, milestones=federation.milestones)), None)
        self._check_transfer(federation)
        baselines = self.config.evaluation.baselines if is_measured else ()
        trained = [name for name in baselines if name in (*AVERAGES, "dm_ensemble")]
        if trained and not federation.n_train:
            raise ConfigError(
                f"evaluation.baselines has {trained[0]}, and no client has a labelled text to train a domain model on: "
                "leave the baseline out"
            )
        if "manual_few_shot" in baselines:
            manual_prompt(federation, self.config.evaluation.manual_prompt)
        if "local_only" in baselines:
            try:
                next(each_alone(self.method, unread(federation)), None)
            except ConfigError as error:
                raise ConfigError(
                    f"evaluation.baselines has local_only, where {error}, or leave the baseline out"
                ) from None

    def _check_transfer(self, federation: Federation) -> None:
        if self.config.distillation.max_fm_calls and not (any(federation.unlabelled.values()) or federation.public):
            raise ConfigError(
                "[distillation] has nothing to teach from: no client has unlabelled texts (data.unlabelled, "
                "data.max_labels), and there are no public ones (data.public)"
            )
        target = self.config.cascade.target_risk
        if target is not None and (n := federation.n_train) < (least := least_texts(target)):
            raise ConfigError(
                f"cascade.target_risk = {target:g} can't be shown to hold on the {n} labelled texts of all clients "
                f"together: it takes {least}, or a larger target"
            )

    async def _evaluate(
        self,
        server: Server,
        reading: Reading,
        offered: Mapping[str, Offer],
        stack: tuple[float, float],
        cascades: Mapping[str, Cascade],
        n_test: Mapping[str, int],
    ) -> None:
        teaches = self.config.distillation.max_fm_calls or "distil" in self.method.card.sends
        distilled = ("dm_distilled",) if teaches else ()
        for arm in (*TUNED_ARMS, *distilled) if self.task.labels else ANSWER_ARMS:
            tasks = self._tasks(arm, reading, offered, stack=stack if arm == "fm_dm" else ())
            await self._measure_each(server, tasks, n_test, "evaluation")
        if cascades:
            tasks = self._tasks("cascade", reading, offered, stack=stack)
            tasks = {c: replace(task, cascade=cascades[c]) for c, task in tasks.items() if c in cascades}
            await self._measure_each(server, tasks, n_test, "evaluation")

    async def _evaluate_readings(self, server: Server, federation: Federation, n_test: Mapping[str, int]) -> None:
        """Measure what the method had come to at each milestone, the last one included: as a set and its best prompt
        alone, each under the clients' own calibration and under the pooled one, and as each client would choose."""
        for reading, _ in self._readings if self.config.budget.milestones else ():
            offered = await server.drive(offers(federation, reading), "evaluation", 0)
            for arm in READ_ARMS if self.task.labels else ANSWER_ARMS:
                tasks = self._tasks(arm, reading, offered, at=f"@{reading.milestone}")
                await self._measure_each(server, tasks, n_test, "evaluation")

    def _tasks(
        self, arm: str, reading: Reading, offered: Mapping[str, Offer], stack: tuple[float, ...] = (), at: str = ""
    ) -> dict[str, Evaluate]:
        """What each client is to measure of a reading, ``at`` a milestone or at the end."""
        tasks = {}
        for client in self.client_ids:
            mine = reading.of(client)
            prompt = None if arm.startswith("dm_") else mine.single if arm.startswith("fm_single") else mine.prompt
            tasks[client] = Evaluate(
                arm=arm + at,
                prompt=prompt,
                stack=stack,
                stop=mine.stop if at else None,
                offer=offered.get(client) if arm == "fm_personal" else None,
            )
        return tasks

    async def _measure(self, server: Server, arm: str, prompt: PromptSet, n_test: Mapping[str, int]) -> None:
        """Measure the baseline ``arm`` with the same prompt at every client."""
        await self._measure_each(server, dict.fromkeys(self.client_ids, Evaluate(arm=arm, prompt=prompt)), n_test)

    async def _measure_each(
        self, server: Server, tasks: Mapping[str, Evaluate], n_test: Mapping[str, int], phase: Any = "baselines"
    ) -> None:
        arm = next(iter(tasks.values())).arm
        measured = await server.drive(evaluate(tasks, n_test, self._metrics), phase, 10**9)
        self._arms.setdefault(arm, {}).update(measured)
        mean = float(np.mean([e.values[self._primary] for e in self._arms[arm].values()]))
        self.events.add("arm", {"arm": arm, "metric": self._primary, self._primary: mean})

    async def _baselines(self, federation: Federation, n_test: Mapping[str, int]) -> None:
        for name in self.config.evaluation.baselines:
            if name == "centralised":
                server, prompt = await self.centralised(self.method, unread(federation), "baselines")
                await self._measure(server, name, prompt, n_test)
                continue
            server = self.open(name)
            if name == "zero_shot":
                await self._measure(server, name, as_it_is(federation, zero_shot_prompt(federation)), n_test)
            elif name == "manual_few_shot":
                if not federation.labels:  # nothing to calibrate
                    by_hand = manual_prompt(federation, self.config.evaluation.manual_prompt)
                    await self._measure(server, name, as_it_is(federation, by_hand), n_test)
                    continue
                n_calls = sum(min(MANUAL_CALIBRATION_TEXTS, n) for n in federation.clients.values())
                method = ManualFewShot(prompt=self.config.evaluation.manual_prompt)
                tuned = await self.tune(server, method, unread(federation, max_fm_calls=n_calls), "baselines")
                raw = as_it_is(federation, replace(tuned.prompts[0], readout=()))
                await self._measure(server, name, raw, n_test)
                await self._measure(server, f"{name}_calibrated", tuned, n_test)
            elif name == "dm_ensemble":
                public = ensemble(list(federation.clients), len(federation.labels), federation.public)
                lessons = await server.drive(public, "baselines", 0)
                task = Evaluate(arm=name, lessons=lessons)
                await self._measure_each(server, dict.fromkeys(self.client_ids, task), n_test)
            elif name in AVERAGES:
                parameters = await server.drive(averaged(self._kinds, AVERAGES[name]), "baselines", 0)
                tasks = {c: Evaluate(arm=name, parameters=mine) for c, mine in parameters.items()}
                await self._measure_each(server, tasks, n_test)
            else:
                await self._local_only(server, federation, n_test)

    async def _local_only(self, server: Server, federation: Federation, n_test: Mapping[str, int]) -> None:
        """Each client alone, with its share of the calls."""
        measured = self._arms["fm"]  # who is gone, or has no held-out texts, is not measured here either
        labelled = {client: n for client, n in federation.clients.items() if n}
        share = federation.max_fm_calls // len(labelled)
        here = {client: n for client, n in labelled.items() if client in measured}
        found: list[Reading] = []
        alone = unread(
            federation, clients=here, max_fm_calls=share * len(here), read=found.append, log=self._hear_alone
        )
        await server.drive(each_alone(self.method, alone), "baselines", alone.max_fm_calls)
        tasks = {c: Evaluate(arm="local_only", prompt=own.prompt) for c, own in found[-1].by_client.items()}
        await self._measure_each(server, tasks, n_test)

    def _at(self, milestone: int) -> dict[str, Any]:
        """What was measured at a milestone, as in `summarise`, by the arms' own names."""
        end = f"@{milestone}"
        return summarise({a.removesuffix(end): m for a, m in self._arms.items() if a.endswith(end)})

    def _federation(
        self, n_train: Mapping[str, int], n_unlabelled: Mapping[str, int], soft_space: SoftSpace | None
    ) -> Federation:
        config = self.config
        return Federation(
            clients=n_train,
            labels=self.task.labels,
            words=self.task.words,
            instruction=config.task.instruction,
            public=self.task.public,
            max_fm_calls=config.budget.max_fm_calls,
            max_prompts=config.method.max_prompts,
            seed=config.seed,
            milestones=config.budget.milestones,
            unlabelled=n_unlabelled,
            soft_space=soft_space,
            log=self.events.add,
            read=self._read,
        )

    def _read(self, reading: Reading) -> None:
        """Keep a reading, with what had been spent by then."""
        spent = self.ledger.total(TUNING)
        self._readings.append(
            (
                reading,
                {
                    "milestone": reading.milestone,
                    "fm_calls": reading.fm_calls,
                    "tokens": spent.prompt_tokens + spent.completion_tokens,
                    "bytes_up": spent.bytes_up,
                    "bytes_down": spent.bytes_down,
                    "wall_s": round(self.ledger.seconds(TUNING), 3),
                    "prompt_id": reading.prompt.prompt_id,
                },
            )
        )
        self.events.add("reading", {k: v for k, v in self._readings[-1][1].items() if k != "wall_s"})

    def _releases(self) -> list[dict[str, Any]]:
        """What the method said it let out under differential privacy, in tuning and, where each client tuned alone
        too, then: that of the client that let out most."""
        logged = [e for e in self.events.events if e["kind"] == "release"]
        tuning = [{k: v for k, v in e.items() if k not in ("seq", "time_s", "kind")} for e in logged]
        alone = sorted(self._alone_releases, key=lambda release: -float(release["epsilon"]))[:1]
        phases = [*((TUNING, release) for release in tuning), *(("local_only", release) for release in alone)]
        return [{**release, "phase": phase, "simulated": not self.has_secrets} for phase, release in phases]

    def _hear_alone(self, kind: str, data: Mapping[str, Any]) -> None:
        """The event log hears nothing of baselines, but what they let out counts."""
        if kind == "release":
            self._alone_releases.append(data)

    def shared_arms(self) -> dict[str, dict[str, Evaluated]]:
        """Of every other arm, what the clients gave for it that were measured on the tuned prompt too."""
        tuned = self._arms.get("fm", {})
        whole = {a: m for a, m in self._arms.items() if a != "fm" and "@" not in a}
        both = {a: {c: e for c, e in m.items() if c in tuned} for a, m in whole.items()}
        return {arm: measured for arm, measured in both.items() if measured}

    def _save(self, prompt: PromptSet) -> None:
        """Before anything is measured, which may take long and fail."""
        if self.folder is not None:
            about = {"method": self.method.name, "seed": self.config.seed, "fm": self.fm_id}
            prompt.save(self.folder / "prompt.json", about=about)

    def _finish(self, prompt: PromptSet, stack: tuple[float, float], joined: Mapping[str, Joined]) -> Result:
        config = self.config
        summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "method": self.method.name,
            "seed": config.seed,
            "fm": self.fm_id,
            "fm_in_process": self.fm_in_process,
            "encoder": self.encoder_id,
            "transport": self.transport,
            "n_clients": len(joined),
            "absent": sorted(set(self.client_ids) - set(joined)),
            "labels": list(self.task.labels),
            "prompt_id": prompt.prompt_id,
            "stack": {"fm": round(stack[0], 4), "dm": round(stack[1], 4)},
            "primary_metric": self._primary,
            "metrics": summarise(arms := {a: m for a, m in self._arms.items() if "@" not in a}),
            "calls_per_prediction": {
                arm: float(np.mean([e.calls_per_prediction for e in by_client.values()]))
                for arm, by_client in arms.items()
            },
            "max_fm_calls": config.budget.max_fm_calls,
            "personal": self._choices,
            "readings": [{**spent, "metrics": self._at(spent["milestone"])} for _, spent in self._readings],
            "n_dropped_texts": sum(j.n_dropped for j in joined.values()),
            "ledger": self.ledger.as_dict(),
            "privacy": {"releases": self._releases()},
        }
        if told := realised(self._arms.get("cascade", {}), config.cascade.target_risk):
            summary["cascade"] = told
        self.events.add("end", {"prompt_id": prompt.prompt_id})
        if self.folder is not None:
            summary["comparisons"] = self.compare()
            text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
            write_whole(self.folder / "summary.json", text)
            build_report(self.folder)
        return Result(prompt=prompt, summary=summary, folder=self.folder)


def unread(federation: Federation, **changes: Any) -> Federation:
    """The federation for a baseline's tuning: it is read at its end only, and the event log hears nothing of it."""
    return replace(federation, **{"milestones": (), "log": _silent, "read": _silent, **changes})


def _silent(*_: Any) -> None: ...
