"""What crosses between the federation server and a client, and how it is written on the wire.

Every message is a frozen dataclass, packed with msgpack (numbers as 32-bit floats) and checked field by field when it
is read, so a malformed message is a `WireError` and never half a message. No task asks for a text and no reply carries
one: see the table in docs/boundaries.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

import msgpack
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from promptfed.errors import PromptfedError, WireError
from promptfed.ledger import Count, Usage
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, LabelRequest, TextRequest


class _Message:
    """What every message has: no field that is not its own, no number that is not finite."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


# It names a file or folder at the client.
Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]


# ---------------------------------------------------------------- tasks: server to client


@dataclass(frozen=True, slots=True, kw_only=True)
class Join(_Message):
    """Say how many texts you hold and which labels occur. ``labels`` are the task's, in the order that counts from now
    on; ``seed`` is the run's."""

    labels: tuple[str, ...]
    seed: Count
    kind: Literal["join"] = "join"


@dataclass(frozen=True, slots=True, kw_only=True)
class Write(_Message):
    """Let the FM write. The prompts hold public text only."""

    requests: tuple[TextRequest, ...]
    kind: Literal["write"] = "write"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weigh(_Message):
    """Let the FM say how likely words are after public text."""

    requests: tuple[LabelRequest, ...]
    kind: Literal["weigh"] = "weigh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote(_Message):
    """Let your domain model read these public or FM-written texts."""

    texts: tuple[str, ...]
    kind: Literal["vote"] = "vote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask(_Message):
    """Ask the FM for the label scores of ``prompts`` on your texts [0, stop), and send their moments.

    Texts are numbered in the client's own shuffled order. What the client has already is not asked for again. Without
    ``stop`` nothing is asked: the moments are over the texts that all ``prompts`` were scored on before.
    """

    prompts: tuple[PromptTemplate, ...]
    stop: int | None
    kind: Literal["ask"] = "ask"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(_Message):
    """Score ``sets`` of ``prompts`` (tuples of indices) on your texts [0, stop), from label scores that you have.

    ``weights`` (one a prompt) and ``bias`` (flat, J x K) are each prompt's pooled calibration, from which the client's
    own cross-fitted one starts. No FM call, unless the task grants some: then scores that you lack, because an `Ask`
    did not reach you, are asked first, if the grant is enough.
    """

    prompts: tuple[PromptTemplate, ...]
    sets: tuple[tuple[int, ...], ...]
    stop: int
    weights: tuple[float, ...]
    bias: tuple[float, ...]
    kind: Literal["score"] = "score"


@dataclass(frozen=True, slots=True, kw_only=True)
class Newton(_Message):
    """Your part of one Newton step of the pooled calibration at (weights, bias), over your texts as in `Ask`.

    With ``words``, the sources that are weighed are the label words of the only prompt.
    """

    prompts: tuple[PromptTemplate, ...]
    stop: int | None
    weights: tuple[float, ...]
    bias: tuple[float, ...]
    words: bool = False
    kind: Literal["newton"] = "newton"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack(_Message):
    """Your part of one Newton step of the two ``weights`` of FM and domain model, which all clients share."""

    prompt: PromptSet
    weights: tuple[float, float]
    kind: Literal["stack"] = "stack"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt(_Message):
    """Take the tuned prompt: fit your own calibration on it, and keep that and the weights of FM and domain model."""

    prompt: PromptSet
    stack: tuple[float, float]
    kind: Literal["adopt"] = "adopt"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitHead(_Message):
    """One FedAvg round of the domain models' linear heads. Empty ``head``: start from zero."""

    head: tuple[float, ...]
    kind: Literal["fit_head"] = "fit_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate(_Message):
    """Measure one arm on your held-out texts. ``prompt``, ``stack`` and ``head`` where the arm needs them."""

    arm: str
    prompt: PromptSet | None = None
    stack: tuple[float, ...] = ()
    head: tuple[float, ...] = ()
    kind: Literal["evaluate"] = "evaluate"


TaskBody = Join | Write | Weigh | Vote | Ask | Score | Newton | Stack | Adopt | FitHead | Evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(_Message):
    """A task for one client in one round. ``grant`` is how many FM calls it may make, ``limit`` how many the client may
    have made in all when the task is done: calls of a reply that was lost are known to the client alone. ``usd`` is the
    money that it may spend; None: as much as it takes.

    ``run`` tells one run from another; ``fleet`` is which memory of the client is meant: tuning, or a baseline.
    """

    round: Count
    client_id: str
    run: Name
    fleet: Name
    grant: Count
    limit: Count
    usd: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    body: Annotated[TaskBody, Field(discriminator="kind")]


# ---------------------------------------------------------------- replies: client to server


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(_Message):
    """``fm`` is the id of the foundation model that the client asks, ``capabilities`` what that can do; ``encoder`` is
    what its domain model reads with."""

    fm: str
    encoder: str
    capabilities: tuple[Capability, ...]
    n_train: Count
    n_test: Count
    labels: tuple[str, ...]
    n_dropped: Count
    kind: Literal["joined"] = "joined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written(_Message):
    """One text a request; empty where the FM failed."""

    texts: tuple[str, ...]
    kind: Literal["written"] = "written"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed(_Message):
    """Log-probabilities of the labels and their numbers of tokens, one row a request; an empty row where the FM failed,
    or does not say."""

    logprobs: tuple[tuple[float, ...], ...]
    n_tokens: tuple[tuple[Count, ...], ...]
    kind: Literal["weighed"] = "weighed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes(_Message):
    """The domain model's probability of each label for each text, in 255ths, row by row."""

    n_labels: Count
    shares: bytes
    kind: Literal["votes"] = "votes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(_Message):
    """Bounded sums over ``n`` texts for each set: of the score (in [0, 1], higher is better), and of the difference to
    the first set, plain and squared."""

    n: Count
    total: tuple[float, ...]
    diff: tuple[float, ...]
    diff_sq: tuple[float, ...]
    kind: Literal["scored"] = "scored"


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentSums(_Message):
    """Flat (J, K) sums over ``n`` texts of the prompts' centred label scores and of their squares."""

    n: Count
    total: tuple[float, ...]
    squares: tuple[float, ...]
    kind: Literal["moment_sums"] = "moment_sums"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewtonPart(_Message):
    """Loss, gradient (J+K,) and flat Hessian of the negative log-likelihood, summed over ``n`` texts."""

    n: Count
    loss: float
    gradient: tuple[float, ...]
    hessian: tuple[float, ...]
    kind: Literal["newton_part"] = "newton_part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted(_Message):
    n_calibration: Count
    kind: Literal["adopted"] = "adopted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(_Message):
    """Flat weights of a linear head, and how many texts it was fitted on."""

    n: Count
    weights: tuple[float, ...]
    kind: Literal["head"] = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(_Message):
    """Per metric: the value on ``n`` texts and its bootstrap standard error."""

    n: Count
    values: Mapping[str, float]
    errors: Mapping[str, float]
    calls_per_prediction: float
    kind: Literal["evaluated"] = "evaluated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Message):
    """The client could not do the task. ``reason`` is an exception's class, never its text."""

    reason: Annotated[str, Field(pattern=r"^\w{1,100}$")]
    kind: Literal["failed"] = "failed"


ReplyBody = Joined | Written | Weighed | Votes | Scored | MomentSums | NewtonPart | Adopted | Head | Evaluated | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(_Message):
    """``usage`` is what the task cost at the FM, journaled answers included: a task costs the same if done again.

    ``calls_before``: FM calls of this client's earlier tasks in the fleet, so that the server learns what a task cost
    whose reply was lost.
    """

    round: Count
    client_id: str
    usage: Usage
    calls_before: Count = 0
    body: Annotated[ReplyBody, Field(discriminator="kind")]


# ---------------------------------------------------------------- codec

_ADAPTERS: dict[type, TypeAdapter[Any]] = {Task: TypeAdapter(Task), Reply: TypeAdapter(Reply)}


def encode(message: Task | Reply) -> bytes:
    """The message as bytes on the wire."""
    packed: bytes = msgpack.packb(_plain(message), use_single_float=True)
    return packed


def decode_task(data: bytes) -> Task:
    """Raises `WireError` unless ``data`` is a whole, valid task."""
    task: Task = _decode(data, Task)
    return task


def decode_reply(data: bytes) -> Reply:
    """Raises `WireError` unless ``data`` is a whole, valid reply."""
    reply: Reply = _decode(data, Reply)
    return reply


def _decode(data: bytes, kind: type) -> Any:
    try:
        return _ADAPTERS[kind].validate_python(msgpack.unpackb(data, use_list=False))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError(f"not a {kind.__name__}: {first['msg']} at {where or 'the top'}") from None
    except (ValueError, TypeError, PromptfedError, msgpack.UnpackException) as error:
        raise WireError(f"not a {kind.__name__}: {type(error).__name__} while unpacking {len(data)} bytes") from None


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, recursively; everything else as msgpack takes it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value
