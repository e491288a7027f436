"""Baselines as methods, on the same books as the others: prompts that are given and not searched for, and another
method by each client alone or on all texts in one place.

``zero_shot`` and ``manual_few_shot`` spend their calls on calibrating a given prompt, which a tuned one is too: what is
left between them is what the search is worth. ``local_only`` and ``centralised`` stand around another method
(``inner``): what federating gains over everybody for themselves, and what it loses against no privacy at all. The
baselines that a run of any method measures beside it (``evaluation.baselines``) are these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from promptfed.errors import ConfigError, RunError
from promptfed.plugins import make_method
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import MAX_TRIES, Card, Federation, Reading, Replies, Round, Steps, Strategy, T
from promptfed.strategies.session import Session
from promptfed.types import Capability

MANUAL_INSTRUCTION = "Classify the sentiment of the text as positive or negative."
MANUAL_EXEMPLARS = (("I loved it.", "positive"), ("It was awful.", "negative"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShot:
    """The person's instruction as it is, calibrated."""

    name: ClassVar[str] = "zero_shot"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE})
    card: ClassVar[Card] = Card(
        paper="baseline: the instruction alone",
        sends=frozenset({"ask", "score", "newton"}),
        crosses="Sums of bounded scores.",
        kinds=frozenset({"classification", "generation"}),
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        return (yield from given(federation, zero_shot_prompt(federation)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ManualFewShot:
    """A hand-written prompt with exemplars, calibrated. ``prompt`` is its text with one {text} slot; without, there is
    one for positive and negative sentiment."""

    prompt: str | None = None

    name: ClassVar[str] = "manual_few_shot"
    needs: ClassVar[frozenset[Capability]] = ZeroShot.needs
    card: ClassVar[Card] = replace(ZeroShot.card, paper="baseline: a hand-written prompt")

    def run(self, federation: Federation) -> Steps[PromptSet]:
        return (yield from given(federation, manual_prompt(federation, self.prompt)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """A baseline around the method that is registered as ``inner``, with options of its own."""

    inner: str = "race"
    inner_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.method  # a wrong name or option is refused before anything is paid for

    @property
    def method(self) -> Strategy:
        """The method itself."""
        method: Strategy = make_method(self.inner, self.inner_options)
        return method

    @property
    def needs(self) -> frozenset[Capability]:
        return self.method.needs

    @property
    def card(self) -> Card:
        inner = self.method.card
        return replace(inner, paper=f"baseline around {self.inner}: {inner.paper}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOnly(Around):
    """Each client alone, with its share of the calls and of the milestones (`each_alone`)."""

    name: ClassVar[str] = "local_only"

    def run(self, federation: Federation) -> Steps[PromptSet]:
        return (yield from each_alone(self.method, federation))


@dataclass(frozen=True, slots=True, kw_only=True)
class Centralised(Around):
    """All texts in one place, the same number of calls. Whoever conducts the run puts them there."""

    name: ClassVar[str] = "centralised"

    def run(self, federation: Federation) -> Steps[PromptSet]:
        return (yield from self.method.run(federation))


def given(federation: Federation, prompt: PromptTemplate) -> Steps[PromptSet]:
    """Score ``prompt`` on all the texts that each milestone pays for, and calibrate it; where no client has a label,
    it stays as it is and costs nothing."""
    if not federation.n_train:
        tuned = as_it_is(federation, prompt)
        for milestone in (*sorted(federation.milestones), federation.max_fm_calls):
            reading = Reading(milestone=milestone, fm_calls=0, prompt=tuned, single=tuned, stop=0, finalists=(prompt,))
            federation.read(reading)
        return tuned
    session = Session(federation, reserve=1.0)
    while True:
        tuned = yield from session.conclude([prompt])
        if session.is_over:
            return tuned


def as_it_is(federation: Federation, prompt: PromptTemplate) -> PromptSet:
    """A single prompt without calibration."""
    return PromptSet(labels=federation.labels, prompts=(prompt,), weights=(1.0,), bias=(0.0,) * len(federation.labels))


# ---------------------------------------------------------------- each client alone


def each_alone(method: Strategy, federation: Federation) -> Steps[PromptSet]:
    """``method`` at each client alone, in rounds that all share.

    A reading at milestone m is each client's own at m / n, with n clients (`Reading.by_client`). What stands for all,
    and is returned, is the prompt of the client with most texts (of several, the first by id): choosing by score would
    take the others' texts, and a client that is alone has none. A client without a label has nothing to tune by and is
    left out. Raises `ConfigError` where a share is too small.
    """
    federation = replace(federation, clients={client: size for client, size in federation.clients.items() if size})
    n = len(federation.clients)
    if not n:
        raise ConfigError("no client has a labelled text, and each client alone is tuned by its own: give some")
    milestone_of = {m // n: m for m in (*sorted(federation.milestones), federation.max_fm_calls)}
    readings: dict[str, list[Reading]] = {client: [] for client in federation.clients}
    n_read = 0
    released: list[Mapping[str, Any]] = []

    def hear(kind: str, data: Mapping[str, Any]) -> None:
        """Scores of clients apart are no curve, but what they let out counts."""
        if kind == "release":
            released.append(data)

    def read_all(here: Collection[str]) -> None:
        """Tell of every milestone that all who are ``here`` have come to."""
        nonlocal n_read
        while here and all(len(readings[client]) > n_read for client in here):
            own = {client: readings[client][n_read] for client in sorted(here)}
            first = own[most_texts(federation, own)]
            spent = sum(reading.fm_calls for reading in own.values())
            milestone = milestone_of[first.milestone]
            federation.read(replace(first, milestone=milestone, fm_calls=spent, finalists=(), by_client=own))
            n_read += 1

    each = {
        client: method.run(
            replace(
                federation,
                clients={client: size},
                max_fm_calls=federation.max_fm_calls // n,
                milestones=tuple(m // n for m in federation.milestones),
                log=hear,
                read=readings[client].append,
            )
        )
        for client, size in federation.clients.items()
    }
    try:
        prompts = yield from side_by_side("local_only", each, read_all)
    except ConfigError as error:
        raise ConfigError(
            f"each client alone has its share of the calls: {error}, times the number of clients"
        ) from None
    # A text lives at one client: the largest of their epsilons holds for all.
    for worst in sorted(released, key=lambda release: -float(release["epsilon"]))[:1]:
        federation.log("release", worst)
    if not prompts:
        raise RunError("local_only: no client came to an end; at least one is needed")
    return prompts[most_texts(federation, prompts)]


def most_texts(federation: Federation, clients: Collection[str]) -> str:
    """Who of ``clients`` has most texts, and of several the first."""
    return min(clients, key=lambda client: (-federation.clients[client], client))


def side_by_side(
    name: str, each: Mapping[str, Steps[T]], after: Callable[[Collection[str]], None] = lambda _here: None
) -> Steps[dict[str, T]]:
    """A method for each client alone, in rounds that all share; by client, what it came to.

    A client that missed a round is asked the same once more; after `MAX_TRIES` in a row it is left out. ``after`` is
    called before each round and at the end, with those who are not.
    """
    done: dict[str, T] = {}
    waiting: dict[str, Round] = {}
    missed = dict.fromkeys(each, 0)

    def go_on(client: str, replies: Replies | None) -> None:
        waiting.pop(client, None)
        try:
            waiting[client] = next(each[client]) if replies is None else each[client].send(replies)
        except StopIteration as end:
            done[client] = end.value

    for client in sorted(each):
        go_on(client, None)
    while waiting:
        after({**done, **waiting})
        calls = {c: round_.grants.get(c, 0) for c, round_ in waiting.items()}
        replies = yield Round(
            name=name,
            tasks={c: round_.tasks[c] for c, round_ in waiting.items()},
            grants={c: n for c, n in calls.items() if not missed[c]},
            again={c: n for c, n in calls.items() if missed[c]},
        )
        for client in sorted(waiting):
            missed[client] = 0 if client in replies else missed[client] + 1
            if client in replies:
                go_on(client, {client: replies[client]})
            elif missed[client] == MAX_TRIES:
                del waiting[client]
    after(done)
    return done


# ---------------------------------------------------------------- given prompts


def zero_shot_prompt(federation: Federation) -> PromptTemplate:
    """The person's instruction and an empty form: what a first try without any tuning looks like."""
    fields = ("Text", "Label" if federation.labels else "Answer")
    return Draft(instruction=federation.instruction, fields=fields, exemplars=(), words=federation.words).template()


def manual_prompt(federation: Federation, given: str | None) -> PromptTemplate:
    """The hand-written few-shot prompt: ``given``, or the project's own for positive/negative sentiment."""
    if given is not None:  # as always in a task without labels
        return PromptTemplate(text=given, words=federation.words)
    index = {label: k for k, label in enumerate(federation.labels)}
    if set(index) != {"negative", "positive"}:
        raise ConfigError(
            f"manual_few_shot: there is no hand-written prompt for the labels {', '.join(federation.labels)}; give one "
            "in method.options.prompt or, for the baseline, in evaluation.manual_prompt, or leave the baseline out"
        )
    return Draft(
        instruction=MANUAL_INSTRUCTION,
        fields=("Text", "Sentiment"),
        exemplars=tuple((text, index[label]) for text, label in MANUAL_EXEMPLARS),
        words=federation.words,
    ).template()
