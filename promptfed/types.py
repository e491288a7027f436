"""Data and protocols that all of promptfed shares.

One *FM call* is one prompt x one example, or one generation, wherever it is made.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
# What is asked of the foundation model: one of several labels, or a short answer in its own words.
TaskKind = Literal["classification", "generation"]
# How an index is searched: by vectors, by words, or by both; and what of a query reaches it.
SearchMode = Literal["dense", "lexical", "hybrid"]
QueryForm = Literal["text", "vector"]


class Capability(enum.StrEnum):
    """What a foundation model can be asked for.

    The three ways to score labels are a ladder: who has one has those below it (`satisfies`), and says the highest.
    """

    TEXT = "text"
    LABEL_LOGPROBS = "label_logprobs"  # exact, of every label word
    TOP_LOGPROBS = "top_logprobs"  # of those among the most probable tokens; the others are censored
    LABEL_CHOICE = "label_choice"  # which label, without a number
    PROMPT_LOGPROBS = "prompt_logprobs"  # of any given continuation, not normalised over labels
    PROMPT_EMBEDS = "prompt_embeds"  # soft prompts: vectors in front of the tokens


_LADDER = (Capability.LABEL_CHOICE, Capability.TOP_LOGPROBS, Capability.LABEL_LOGPROBS)


def satisfies(offered: Collection[Capability], wanted: Capability) -> bool:
    """Whether a model with ``offered`` can do ``wanted``."""
    return wanted in offered or (wanted in _LADDER and any(c in offered for c in _LADDER[_LADDER.index(wanted) :]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPrompt:
    """Vectors that stand in front of a prompt's tokens: float32, little-endian, row by row, of shape (n, hidden).

    `promptfed.prompts.soft` makes one from an array and checks it.
    """

    __pydantic_config__ = {"extra": "forbid", "ser_json_bytes": "base64", "val_json_bytes": "base64"}  # noqa: RUF012

    n: int
    hidden: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftSpace:
    """Where a model's soft prompts live: numbers in a vector, and the standard deviation of those of its tokens."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012  (a message carries this)

    hidden: int
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRequest:
    """Score each label as the continuation of ``prefix + text + suffix``.

    ``prefix`` is what many requests share and an engine may compute once. ``labels`` are whole
    continuations, separator included (``" positive"``). ``absolute`` asks for log-probabilities over the whole
    vocabulary in place of those normalised over the labels. ``soft`` stands before the prefix.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by pydantic where a message carries this)

    prefix: str
    text: str
    suffix: str
    labels: tuple[str, ...]
    absolute: bool = False
    soft: SoftPrompt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """Continue ``prompt`` with at most ``max_tokens`` tokens, cut before the first of ``stop``.

    ``temperature`` 0 is greedy; otherwise tokens are drawn from the nucleus of mass ``top_p``,
    seeded by ``seed`` alone, so the same request has the same answer.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by pydantic where a message carries this)

    prompt: str
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ("\n",)
    soft: SoftPrompt | None = None


FMRequest = LabelRequest | TextRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class FMResponse:
    """One answer. A failure is a value: ``error`` says why and the answer fields are ``None``.

    ``outage``: the model was not reached, or had no answer to anything (overload, timeout), so the failure says nothing
    of this item.
    ``retry_after_s``: seconds that the model asked to be left alone for.
    ``logprobs`` are natural logarithms, one a label, normalised over the labels unless `LabelRequest.absolute`.
    ``censored`` says of which labels no more is known than that their log-probability is at most the one given; None
    where all are exact.
    ``label_tokens`` counts each label's tokens; None where all have one, or the model does not say.
    ``cached_tokens`` counts the prompt tokens that were not computed anew for this answer. ``from_cache``: the whole
    answer was remembered by the client, nothing was asked.
    """

    logprobs: tuple[float, ...] | None = None
    label_tokens: tuple[int, ...] | None = None
    censored: tuple[bool, ...] | None = None
    text: str | None = None
    error: str | None = None
    outage: bool = False
    retry_after_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    usd: float = 0.0
    truncated: bool = False
    from_cache: bool = False


@runtime_checkable
class FoundationModel(Protocol):
    """A frozen model that answers requests. It is never trained."""

    @property
    def fm_id(self) -> str:
        """Name and digest of the weights (or the provider's fingerprint)."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]: ...

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        """Answer every request, in order. Failures of single items are values."""
        ...


class LabelScorer(Protocol):
    """What `PromptSet.predict` needs of a foundation model: every `promptfed.load_fm` model has it. Prompts with label
    words need the first, prompts that generate the second."""

    def score_labels(self, prompt: Any, texts: Sequence[str]) -> np.ma.MaskedArray[Any, Any]:
        """Log-probabilities (n, n_labels) of a template's label words; failed rows are masked."""
        ...

    def write_answers(self, prompt: Any, texts: Sequence[str]) -> list[str | None]:
        """What is written behind a template without label words; None where the model failed."""
        ...


class Encoder(Protocol):
    """Turns texts into unit vectors, shape (n, dimension), float64."""

    @property
    def encoder_id(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> FloatArray: ...


class DomainModel(Protocol):
    """A small model that a client trains at home."""

    def fit(self, texts: Sequence[str], targets: FloatArray) -> DomainModel:
        """Fit on ``targets`` of shape (n, n_labels) whose rows sum to 1."""
        ...

    def predict_proba(self, texts: Sequence[str]) -> FloatArray:
        """Label probabilities, shape (n, n_labels)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A passage that a search found. ``score``: higher is better, on the scale of whoever searched.

    ``owner`` is whose index it is from, "" for one's own. ``text`` is what the owner shows of it: "" where its policy
    lets scores out only.
    """

    doc_id: str
    passage: int = 0
    score: float
    text: str = field(default="", repr=False)
    owner: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)


@runtime_checkable
class Retriever(Protocol):
    """Finds passages."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most ``k`` hits a query, the best first."""
        ...


class Transport(Protocol):
    """Carries encoded tasks to clients and brings encoded replies back, by client id.

    It returns when all of ``awaited`` have answered or ``deadline_s`` has passed; a client that has not answered by
    then is missing from the result.
    """

    async def exchange(
        self, tasks: Mapping[str, bytes], awaited: Collection[str], deadline_s: float | None
    ) -> dict[str, bytes]: ...
