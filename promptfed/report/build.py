"""The run report: reads a run folder, checks what it reads, and renders one HTML page that needs nothing else.

Everything that the page says comes from the run folder, so a report can be made again at any time and is the same
bytes. Text in it was written by a foundation model and by strangers: the template escapes all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from promptfed.config import Config, load_config
from promptfed.errors import ConfigError, DataError
from promptfed.files import write_whole
from promptfed.ledger import Account
from promptfed.privacy.accounting import in_all
from promptfed.prompts.artefact import PromptSet
from promptfed.report.charts import Mark, Point, bars, curve, histogram

# More clients than this are shown as a distribution: as many small pictures are still looked at one by one.
MAX_PICTURES = 12

# Short names of arms, for pictures and tables; what each is stands in the template. An unknown arm keeps its own name.
NAMES = {
    "fm": "tuned prompts",
    "fm_pooled": "tuned, new client",
    "fm_single": "tuned, best one",
    "fm_single_pooled": "best one, new client",
    "fm_personal": "each client's choice",
    "fm_dm": "tuned + own model",
    "cascade": "cascade",
    "dm_local": "own small model",
    "dm_distilled": "own, taught by FM",
    "dm_fedavg": "FedAvg model",
    "dm_fedprox": "FedProx model",
    "dm_fedadam": "FedAdam model",
    "dm_ensemble": "taught by all models",
    "zero_shot": "instruction alone",
    "manual_few_shot": "hand-written",
    "manual_few_shot_calibrated": "hand-written, cal.",
    "local_only": "each client alone",
    "centralised": "all texts together",
}
# Metrics by another name than their own.
METRIC_NAMES = {"token_f1": "token F1", "exact_match": "exact match"}
# What a run ships, not what it is compared with.
OWN_ARMS = ("fm", "fm_pooled", "fm_single", "fm_single_pooled", "fm_personal", "fm_dm", "cascade")
CLIENT_ARMS = ("fm", "fm_dm", "dm_local", "manual_few_shot", "zero_shot")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Value(_Record):
    """One client's value of a metric."""

    value: FiniteFloat
    n: int
    ci95: tuple[FiniteFloat, FiniteFloat]


class Arm(_Record):
    """One arm's mean over clients of a metric."""

    mean: FiniteFloat
    ci95: tuple[FiniteFloat, FiniteFloat]
    by_client: dict[str, Value] = Field(min_length=1)


class Paired(_Record):
    """The tuned prompts less another arm, compared text by text."""

    difference: FiniteFloat
    ci95: tuple[FiniteFloat, FiniteFloat]


@dataclass(slots=True, kw_only=True)
class PhaseAccount(Account):
    """The ledger of one phase."""

    wall_s: float = 0.0
    by_client: dict[str, Account] = field(default_factory=dict)


class Milestone(_Record):
    """What a smaller budget would have come to."""

    milestone: int
    fm_calls: int
    metrics: dict[str, dict[str, Arm]] = Field(default_factory=dict)


class Released(_Record):
    """What each client let out under differential privacy (`promptfed.privacy.accounting.Release`), and when."""

    phase: str
    mechanism: str
    unit: str
    epsilon: FiniteFloat
    delta: FiniteFloat
    noise_multiplier: FiniteFloat
    n_compositions: int
    sampling_rate: FiniteFloat
    n_outputs: int
    not_covered: str
    simulated: bool


class Privacy(_Record):
    """Empty where nothing is claimed."""

    releases: tuple[Released, ...] = ()

    @property
    def totals(self) -> dict[str, tuple[float, float]]:
        """(epsilon, delta) of all releases together, by unit."""
        units = dict.fromkeys(r.unit for r in self.releases)
        return {u: in_all((r.epsilon, r.delta) for r in self.releases if r.unit == u) for u in units}


class Cascaded(_Record):
    """Who answered the held-out texts in a cascade, and how much of it was wrong."""

    target_risk: FiniteFloat
    share_by_stage: dict[str, FiniteFloat]
    wrong_by_stage: dict[str, FiniteFloat | None]
    realised_risk: FiniteFloat | None


class Summary(_Record):
    """What the report needs of summary.json."""

    schema_version: Literal[1]
    method: str
    seed: int
    fm: str
    fm_in_process: bool | None = None
    encoder: str
    transport: str
    n_clients: int
    absent: tuple[str, ...] = ()
    labels: tuple[str, ...]
    prompt_id: str
    primary_metric: str
    metrics: dict[str, dict[str, Arm]]
    calls_per_prediction: dict[str, float]
    max_fm_calls: int
    readings: tuple[Milestone, ...] = ()
    n_dropped_texts: int
    personal: dict[str, int] = Field(default_factory=dict)
    comparisons: dict[str, Paired] = Field(default_factory=dict)
    cascade: Cascaded | None = None
    ledger: dict[str, PhaseAccount]
    privacy: Privacy

    @property
    def arms(self) -> dict[str, Arm]:
        """The primary metric by arm; empty if no client held texts out."""
        return self.metrics.get(self.primary_metric, {})


class RoundEvent(_Record):
    """One exchange between the server and clients."""

    kind: Literal["round"]
    round: int
    phase: str
    name: str
    bytes_up: int
    bytes_down: int
    failures: dict[str, str]


class HeatEvent(_Record):
    """Candidates were scored; the best one so far."""

    kind: Literal["heat"]
    fm_calls: int
    n_candidates: int
    n_texts: int
    best_score: FiniteFloat
    best_prompt: str
    best_words: tuple[str, ...]


class SetsEvent(_Record):
    """Sets of candidates were compared; the best set so far."""

    kind: Literal["sets"]
    fm_calls: int
    n_sets: int
    n_texts: int
    best_score: FiniteFloat
    prompts: tuple[str, ...]


Event = RoundEvent | HeatEvent | SetsEvent
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder, read and checked."""

    summary: Summary
    events: tuple[Event, ...]
    prompt: PromptSet
    config: Config


def build_report(folder: Path) -> Path:
    """Write ``folder``/report.html from what the run left there, and return its path.

    Raises `DataError`, naming the file, if one is missing or is not what a run writes.
    """
    run = read_run(folder)
    environment = Environment(
        loader=PackageLoader("promptfed", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "bytes": human_bytes, "seconds": human_seconds}
    environment.filters |= {"short": name_of, "headed": headed}
    page = environment.get_template("report.html").render(view(run))
    path = folder / "report.html"
    # A model may write half a character; the page then shows a question mark.
    write_whole(path, page)
    return path


# ------------------------------------------------------------------------------------------------ reading


def read_run(folder: Path) -> Run:
    """Read the four files. Raises `DataError`."""
    prompt = PromptSet.load(folder / "prompt.json")
    summary = _checked(TypeAdapter(Summary), _read(folder / "summary.json"), str(folder / "summary.json"))
    if summary.prompt_id != prompt.prompt_id:
        raise DataError(
            f"{folder}: summary.json is about prompt {summary.prompt_id}, prompt.json has {prompt.prompt_id}"
        )
    path = folder / "events.jsonl"
    events = []
    # Not splitlines(): a model may have written one of the other characters that it takes for the end of a line.
    for number, line in enumerate(_read(path).rstrip("\n").split("\n"), 1):
        record = _checked(TypeAdapter(dict[str, Any]), line, f"{path}: line {number}")
        if record.get("kind") in ("round", "heat", "sets"):
            events.append(_checked(_EVENT, line, f"{path}: line {number}"))
    try:
        config = load_config(folder / "config.toml")
    except ConfigError as error:
        raise DataError(str(error)) from None
    return Run(summary=summary, events=tuple(events), prompt=prompt, config=config)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; is the folder a finished run?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({type(error).__name__})") from None


T = TypeVar("T")


def _checked(adapter: TypeAdapter[T], text: str, where: str) -> T:
    try:
        # The standard parser takes all that the standard writer writes, NaN and lone surrogates included.
        return adapter.validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{where}: {first['msg']} at {place or 'the top'}; was it written by another version?"
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({type(error).__name__})") from None


# ------------------------------------------------------------------------------------------------ what the page shows


def view(run: Run) -> dict[str, Any]:
    """All that the template needs, by name."""
    summary, ledger = run.summary, run.summary.ledger
    rounds = [e for e in run.events if isinstance(e, RoundEvent)]
    clients = sorted({c for phase in ledger.values() for c in phase.by_client})
    by_client = {c: [phase.by_client.get(c, Account()) for phase in ledger.values()] for c in clients}
    return {
        "run": run,
        "summary": summary,
        "generates": not summary.labels,
        "primary": METRIC_NAMES.get(summary.primary_metric, summary.primary_metric),
        "max_pictures": MAX_PICTURES,
        "client_arms": [arm for arm in CLIENT_ARMS if arm in summary.arms],
        **headline(summary),
        "curves": curves(run),
        "milestones": [(r, r.metrics.get(summary.primary_metric, {})) for r in summary.readings if r.metrics],
        "pictures": client_pictures(summary),
        "client_rows": client_rows(summary),
        "history": history(run.events),
        "total": _sum(list(ledger.values())),
        "by_client": {c: (accounts, _sum(accounts)) for c, accounts in by_client.items()},
        "messages": messages(rounds),
        "failures": [(e, client, reason) for e in rounds for client, reason in sorted(e.failures.items())],
    }


def name_of(arm: str) -> str:
    """Short name of an arm."""
    return NAMES.get(arm, arm)


def headed(name: str) -> str:
    """As a heading begins: "token F1" -> "Token F1"."""
    return name[:1].upper() + name[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Tuned prompts less another arm, with its 95% interval."""

    arm: str
    gain: float
    ci95: tuple[float, float]

    @property
    def tone(self) -> str:
        return "good" if self.ci95[0] > 0 else "bad" if self.ci95[1] < 0 else "even"


def headline(summary: Summary) -> dict[str, Any]:
    """``title``, ``tone`` (good, even or bad) and ``comparisons`` with every arm that is not of the tuned prompts."""
    arms = summary.arms
    if "fm" not in arms:
        return {"title": "A prompt was tuned, but nothing was measured", "tone": "even", "comparisons": []}
    tuned = arms["fm"]
    comparisons = [
        Comparison(arm=a, gain=summary.comparisons[a].difference, ci95=summary.comparisons[a].ci95)
        for a in arms
        if a not in OWN_ARMS and a in summary.comparisons
    ]
    comparisons.sort(key=lambda c: (c.arm != "zero_shot", c.gain))
    if not comparisons:
        return {"title": f"Tuned prompt {percent(tuned.mean)}", "tone": "even", "comparisons": []}
    first, tone = comparisons[0], comparisons[0].tone
    opening = {"good": "Tuned prompt", "even": "No clear gain: tuned prompt", "bad": "No gain: tuned prompt"}[tone]
    title = f"{opening} {percent(tuned.mean)} against {percent(arms[first.arm].mean)} {name_of(first.arm)}"
    # What a reader could have had without this run must not stay in the small print.
    rivals = [c.arm for c in comparisons[1:] if c.gain <= 0 and c.arm != "centralised"]
    if rivals:
        title += f"{', but' if tone == 'good' else ';'} {name_of(rivals[0])} reaches {percent(arms[rivals[0]].mean)}"
        tone = "even" if tone == "good" else tone
    return {"title": title, "tone": tone, "comparisons": comparisons}


def curves(run: Run) -> list[Markup]:
    """The tuning curve, for wide and for narrow windows; empty if the method reported no scores."""
    found = [
        Point(fm_calls=e.fm_calls, score=e.best_score, n_texts=e.n_texts, kind=e.kind)
        for e in run.events
        if not isinstance(e, RoundEvent)
    ]
    if run.summary.labels:
        quantity = "1 \N{MINUS SIGN} Brier/2"
        held_out = {arm: 1 - of.mean / 2 for arm, of in run.summary.metrics.get("brier", {}).items()}
    else:
        quantity = "token F1"
        held_out = {arm: of.mean for arm, of in run.summary.metrics.get("token_f1", {}).items()}
    levels = [
        Mark(arm=arm, name=name_of(arm), value=value)
        for arm, value in held_out.items()
        if arm == "fm" or arm not in OWN_ARMS
    ]
    most = run.summary.max_fm_calls
    return [curve(found, levels, most, quantity, wide=wide) for wide in (True, False)] if found else []


def client_rows(summary: Summary) -> list[tuple[str, dict[str, Value]]]:
    """Clients and their values by arm, the worst served by the tuned prompts first."""
    shown = {arm: summary.arms[arm].by_client for arm in CLIENT_ARMS if arm in summary.arms}
    clients = sorted({c for of in shown.values() for c in of})
    rows = [(c, {arm: of[c] for arm, of in shown.items() if c in of}) for c in clients]
    return sorted(rows, key=lambda row: row[1]["fm"].value if "fm" in row[1] else math.inf)


def client_pictures(summary: Summary) -> list[tuple[str, str, Markup]]:
    """(title, note, picture) for each client, or for each arm if there are many clients."""
    primary = METRIC_NAMES.get(summary.primary_metric, summary.primary_metric)
    quantity = f"{headed(primary)} on held-out texts (%)"
    rows = client_rows(summary)
    if len(rows) > MAX_PICTURES:
        by_arm = {arm: [of[arm].value for _, of in rows if arm in of] for arm in CLIENT_ARMS if arm in summary.arms}
        return [
            (name_of(arm), f"{len(values)} clients", histogram(name_of(arm), arm, values, quantity))
            for arm, values in by_arm.items()
        ]
    out = []
    for client, of in sorted(rows):
        marks = [
            Mark(arm=arm, name=name_of(arm), value=v.value, low=max(0.0, v.ci95[0]), high=min(1.0, v.ci95[1]))
            for arm, v in of.items()
        ]
        n = max((v.n for v in of.values()), default=0)
        out.append((client, f"{n:,} held-out texts", bars(client, marks, quantity)))
    return out


def history(events: Sequence[Event]) -> list[dict[str, Any]]:
    """How the best prompt (in heats) and the best set of prompts changed, in order."""
    out: list[dict[str, Any]] = []
    last: dict[str, list[str]] = {}
    for e in (e for e in events if not isinstance(e, RoundEvent)):
        prompts, words = ((e.best_prompt,), e.best_words) if isinstance(e, HeatEvent) else (e.prompts, ())
        key = sorted((*prompts, *words))
        out.append({"event": e, "prompts": prompts, "words": words, "new": last.get(e.kind) != key})
        last[e.kind] = key
    return out


def messages(rounds: Sequence[RoundEvent]) -> list[dict[str, Any]]:
    """Rounds by phase and kind (the first word of their name): how many, and bytes."""
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for e in rounds:
        kind = e.name.split(" ")[0]
        row = out.setdefault((e.phase, kind), {"phase": e.phase, "kind": kind, "n": 0, "bytes_up": 0, "bytes_down": 0})
        row["n"] += 1
        row["bytes_up"] += e.bytes_up
        row["bytes_down"] += e.bytes_down
    return list(out.values())


def _sum(accounts: Sequence[Account]) -> PhaseAccount:
    names = (*(f.name for f in fields(Account)), "wall_s")
    sums: dict[str, Any] = {name: sum(getattr(account, name, 0) for account in accounts) for name in names}
    return PhaseAccount(**sums)


# ------------------------------------------------------------------------------------------------ numbers to read


def percent(share: float) -> str:
    """0.8783 -> "87.8%"; intervals that reach over the end are cut there."""
    return f"{min(1.0, max(0.0, share)):.1%}"


def points(share: float) -> str:
    """0.1227 -> "+12.3", percentage points. The sign stays where they round to 0: it says on which side."""
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def human_bytes(n: int) -> str:
    """52149 -> "52.1 kB"."""
    power = min(3, max(0, (len(str(n)) - 1) // 3))
    return f"{n / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB')[power]}"


def human_seconds(seconds: float) -> str:
    """112.3 -> "1 min 52 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
