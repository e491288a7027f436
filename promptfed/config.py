"""The configuration of a run: TOML in, validated once, unknown keys refused by name.

Paths in a file are relative to the file. ``--set a.b=c`` values are TOML where they parse as TOML, else strings.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from promptfed.errors import ConfigError
from promptfed.types import TaskKind


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class ClientFiles(_Section):
    """``[[clients]]``: one organisation with files of its own; without ``train``, it has no label."""

    id: str = Field(min_length=1)
    train: Path | None = None
    test: Path | None = None
    unlabelled: Path | None = None
    domain_model: str | None = None


class Data(_Section):
    """``[data]``: where the texts are and what the columns are called. ``unlabelled`` texts are the clients' own,
    without a label; with ``max_labels``, no client has more training texts with a label, and its others are unlabelled
    too."""

    train: Path | None = None
    test: Path | None = None
    public: Path | None = None
    unlabelled: Path | None = None
    max_labels: int | None = Field(ge=0, default=None)
    client_column: str = "client"
    text_column: str = "text"
    label_column: str = "label"


class Partition(_Section):
    """``[partition]``: split data without a client column among simulated clients."""

    clients: int = Field(ge=1)
    alpha: float = Field(gt=0, default=0.5)


class Task(_Section):
    """``[task]``: what is asked of the foundation model. ``generation`` is of short answers, which stand in the label
    column; it has no labels and no words for them."""

    kind: TaskKind = "classification"
    labels: tuple[str, ...] = ()
    instruction: str = ""
    verbalizer: dict[str, str] = {}


class FM(_Section):
    """``[fm]``: the model that scores, and the one that writes (by default the same); a file with what their tokens
    cost, and one to remember answers in."""

    scorer: str = "embedded:smollm2-135m-instruct"
    proposer: str | None = None
    prices: Path | None = None
    cache: Path | None = None


class Encoder(_Section):
    """``[encoder]``: what the domain models read texts with."""

    name: str = "all-minilm-l6-v2"


class DomainModels(_Section):
    """``[domain_model]``: of which kind the clients' domain models are,
    and which clients have another."""

    kind: str = "linear"
    by_client: dict[str, str] = {}


class Distillation(_Section):
    """``[distillation]``: after tuning, the FM teaches the domain models with at most ``max_fm_calls`` calls. Its
    log-odds are divided by ``temperature``; a text that it is less sure of than ``min_confidence`` is left out."""

    max_fm_calls: int = Field(ge=0, default=0)
    temperature: float = Field(gt=0, default=1.0)
    min_confidence: float = Field(ge=0, le=1, default=0.9)


class Cascading(_Section):
    """``[cascade]``: let the domain models answer alone what they are sure enough of. ``target_risk`` is the share of
    such answers that may be wrong; ``max_fm_calls`` more calls, with the best prompt on labelled texts, tell how sure
    is sure enough."""

    target_risk: float | None = Field(gt=0, lt=1, default=None)
    max_fm_calls: int = Field(ge=0, default=0)


class Method(_Section):
    """``[method]``: the name of a registered method, and what it may be told (``promptfed methods NAME``)."""

    name: str = "race"
    max_prompts: int = Field(ge=1, le=16, default=3)
    options: dict[str, Any] = {}


class Budget(_Section):
    """``[budget]``: what tuning may spend, all clients together. ``milestones`` are smaller numbers of FM calls at
    which the run is measured as well."""

    max_fm_calls: int = Field(ge=1, default=2500)
    milestones: tuple[int, ...] = ()
    max_tokens: int | None = Field(ge=1, default=None)
    max_usd: float | None = Field(gt=0, default=None)

    @model_validator(mode="after")
    def _in_order(self) -> Budget:
        if list(self.milestones) != sorted({m for m in self.milestones if 0 < m < self.max_fm_calls}):
            raise ValueError(
                f"milestones = {list(self.milestones)}: expected ascending numbers of calls below max_fm_calls = "
                f"{self.max_fm_calls}"
            )
        return self


class Rounds(_Section):
    """``[rounds]``: how long a round waits for clients, and the share of those asked that must answer."""

    deadline_s: float | None = Field(gt=0, default=None)
    quorum: float = Field(gt=0, le=1, default=0.5)


class Network(_Section):
    """``[network]``: where this server waits for its clients, and who they are.

    ``clients`` maps each client's id to a file with its public key; with ``insecure`` (plain text, nobody is checked)
    it is a list of ids. ``attached`` waits for the app in a Flower deployment that others run, instead of running one.
    """

    listen: str = "127.0.0.1:9300"
    clients: dict[str, Path] | tuple[str, ...] = Field(min_length=1)
    certificate: Path | None = None
    private_key: Path | None = None
    insecure: bool = False
    attached: bool = False
    wait_s: float = Field(gt=0, default=600.0)


Baseline = Literal[
    "zero_shot",
    "manual_few_shot",
    "local_only",
    "dm_fedavg",
    "dm_fedprox",
    "dm_fedadam",
    "dm_ensemble",
    "centralised",
]


class Evaluation(_Section):
    """``[evaluation]``: the baselines. ``manual_prompt`` is a raw prompt with one {text} slot."""

    baselines: tuple[Baseline, ...] = ("zero_shot", "manual_few_shot")
    manual_prompt: str | None = None


class Config(_Section):
    """A whole run."""

    seed: int = Field(ge=0, default=1)
    data: Data = Data()
    clients: tuple[ClientFiles, ...] = ()
    partition: Partition | None = None
    task: Task = Task()
    fm: FM = FM()
    encoder: Encoder = Encoder()
    domain_model: DomainModels = DomainModels()
    method: Method = Method()
    distillation: Distillation = Distillation()
    cascade: Cascading = Cascading()
    budget: Budget = Budget()
    rounds: Rounds = Rounds()
    network: Network | None = None
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if self.network is not None:
            return self._over_a_network(self.network)
        if (self.data.train is None) == (not self.clients):
            raise ValueError("give either data.train or [[clients]] with a train file each")
        if empty := [c.id for c in self.clients if c.train is None and c.unlabelled is None]:
            raise ValueError(f"[[clients]] {empty[0]!r} has neither a train nor an unlabelled file")
        if self.clients and (self.data.test or self.data.unlabelled or self.partition):
            raise ValueError("data.test, data.unlabelled and [partition] go with data.train, not with [[clients]]")
        if self.partition is not None and self.data.unlabelled:
            raise ValueError("[partition] deals texts out by label, and data.unlabelled has none: use data.max_labels")
        ids = [c.id for c in self.clients]
        if len(set(ids)) != len(ids):
            raise ValueError("two [[clients]] have the same id")
        if self.method.name == "centralised" and "centralised" in self.evaluation.baselines:
            raise ValueError("evaluation.baselines has centralised, which is the method here: the arm fm is it")
        self._check_labels()
        return self

    def _over_a_network(self, network: Network) -> Config:
        data = self.data
        if data.train or data.test or data.unlabelled or data.max_labels is not None or self.clients or self.partition:
            raise ValueError(
                "with [network] the texts are at the clients: leave out data.train, data.test, data.unlabelled, "
                "data.max_labels, [[clients]] and [partition]"
            )
        if self.domain_model != DomainModels():
            raise ValueError(
                "with [network] each client names its domain model (promptfed client --domain-model): leave out "
                "[domain_model]"
            )
        if (self.fm, self.encoder) != (FM(), Encoder()):
            raise ValueError(
                "with [network] each client names its FM and encoder (promptfed client --fm, --encoder): "
                "leave out [fm] and [encoder]"
            )
        if not self.task.labels and self.task.kind == "classification":
            raise ValueError("with [network] task.labels has to say which labels there are, in their order")
        for key, named in (("method.name", [self.method.name]), ("evaluation.baselines", self.evaluation.baselines)):
            if "centralised" in named:
                raise ValueError(f"{key} has centralised: over a network texts can't be put in one place")
        if isinstance(network.clients, dict) == network.insecure:
            raise ValueError(
                "network.clients maps ids to files with public keys; only with network.insecure = true (plain text, "
                "nobody is checked) it is a list of ids"
            )
        self._check_labels()
        return self

    def _check_labels(self) -> None:
        if self.task.kind == "generation":
            self._check_generation()
            return
        if self.cascade.max_fm_calls and self.cascade.target_risk is None:
            raise ValueError("cascade.max_fm_calls does nothing without cascade.target_risk: set it, or leave it out")
        if not self.distillation.max_fm_calls and self.distillation != Distillation():
            raise ValueError(
                "[distillation] teaches nothing without calls: set distillation.max_fm_calls, or leave the section out"
            )
        if "dm_ensemble" in self.evaluation.baselines and self.data.public is None:
            raise ValueError(
                "evaluation.baselines has dm_ensemble, where the domain models vote on public texts: give data.public"
            )
        if len(set(self.task.labels)) != len(self.task.labels) or len(self.task.labels) == 1:
            raise ValueError("task.labels must be two or more different labels")

    def _check_generation(self) -> None:
        """What goes with labels only is refused."""
        if self.task.labels or self.task.verbalizer:
            raise ValueError(
                "task.kind = 'generation' has answers in place of labels: leave out task.labels and task.verbalizer"
            )
        if self.partition is not None:
            raise ValueError("[partition] deals texts out by label, and task.kind = 'generation' has none")
        if small := [name for name in self.evaluation.baselines if name.startswith("dm_")]:
            raise ValueError(
                f"evaluation.baselines has {small[0]}: with task.kind = 'generation' no small model answers"
            )
        if self.cascade.target_risk is not None:
            raise ValueError("[cascade] is of small models, and with task.kind = 'generation' there are none")
        if self.data.max_labels is not None:
            raise ValueError("data.max_labels is of labels, and task.kind = 'generation' has none")
        if self.distillation.max_fm_calls:
            raise ValueError("[distillation] teaches small models, and with task.kind = 'generation' there are none")
        if "manual_few_shot" in self.evaluation.baselines and self.evaluation.manual_prompt is None:
            raise ValueError(
                "evaluation.baselines has manual_few_shot, but there is no hand-written prompt for task.kind = "
                "'generation'; give one in evaluation.manual_prompt, or set evaluation.baselines = [\"zero_shot\"]"
            )


def load_config(source: Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Read and check a TOML file, a mapping as TOML would give, or a `Config`. Raises `ConfigError`."""
    if isinstance(source, Config):
        raw: dict[str, Any] = source.model_dump(exclude_none=True)
        base, where = Path(), "configuration"
    elif isinstance(source, Path):
        raw, base, where = _read_toml(source), source.resolve().parent, str(source)
    else:
        raw, base, where = dict(source), Path(), "configuration"
    for override in overrides:
        _apply(raw, override)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(e)}" for e in error.errors(include_url=False))) from None
    return _rebased(config, base)


def dump_toml(config: Config) -> str:
    """The configuration as TOML, with absolute paths, so that a run folder says what was run."""
    raw = config.model_dump(mode="json", exclude_none=True)
    top = {k: v for k, v in raw.items() if not isinstance(v, dict | list)}
    lines = [f"{k} = {_toml(v)}" for k, v in top.items()]
    for name, table in raw.items():
        for entry in table if isinstance(table, list) else [table]:
            if isinstance(entry, dict):
                lines += ["", f"[[{name}]]" if isinstance(table, list) else f"[{name}]"]
                lines += [f"{k} = {_toml(v)}" for k, v in entry.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's strings are JSON's
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return str(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override!r}: {section} is not a section")
    place[last] = value


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        fields = _fields_at(error["loc"][:-1])
        close = get_close_matches(str(error["loc"][-1]), fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(fields)}"
        return f"unknown key {where!r}{hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    return f"{where} = {error['input']!r}: {message}"


def _fields_at(location: Sequence[Any]) -> list[str]:
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        inner = [
            a
            for a in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _rebased(config: Config, base: Path) -> Config:
    def absolute(path: Path | None) -> Path | None:
        return None if path is None else (base / path.expanduser()).resolve()

    data = config.data.model_copy(
        update={k: absolute(getattr(config.data, k)) for k in ("train", "test", "public", "unlabelled")}
    )
    fm = config.fm.model_copy(update={k: absolute(getattr(config.fm, k)) for k in ("prices", "cache")})
    clients = tuple(
        c.model_copy(update={k: absolute(getattr(c, k)) for k in ("train", "test", "unlabelled")})
        for c in config.clients
    )
    network = config.network
    if network is not None:
        files: dict[str, Any] = {k: absolute(getattr(network, k)) for k in ("certificate", "private_key")}
        if isinstance(network.clients, dict):
            files["clients"] = {client: absolute(key) for client, key in network.clients.items()}
        network = network.model_copy(update=files)
    return config.model_copy(update={"data": data, "fm": fm, "clients": clients, "network": network})
