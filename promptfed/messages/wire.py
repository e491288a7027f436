"""The envelope of a task and of a reply, and how both are written on the wire.

Every message is a frozen dataclass, packed with msgpack (numbers as 32-bit floats) and checked field by field when it
is read, so a malformed message is a `WireError` and never half a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from promptfed.errors import PromptfedError, WireError
from promptfed.ledger import Count, Usage
from promptfed.messages import core, methods, retrieval
from promptfed.messages.core import Message

# It names a file or folder at the client.
Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]

TaskBody = (
    core.Join
    | core.Write
    | core.Weigh
    | core.Vote
    | core.Ask
    | core.Score
    | core.Newton
    | core.Stack
    | core.Risk
    | core.Adopt
    | core.Train
    | core.Teach
    | core.Distil
    | core.Unlearn
    | core.Evaluate
    | methods.TaskBody
    | retrieval.TaskBody
)
ReplyBody = (
    core.Joined
    | core.Written
    | core.Weighed
    | core.Votes
    | core.Scored
    | core.MomentSums
    | core.NewtonPart
    | core.RiskCounts
    | core.Adopted
    | core.Trained
    | core.Distilled
    | core.Unlearned
    | core.Evaluated
    | core.Failed
    | methods.ReplyBody
    | retrieval.ReplyBody
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Message):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Message):
    """``usage`` is what the task cost at the FM, journaled answers included: a task costs the same if done again.

    ``calls_before`` and ``usd_before``: FM calls of this client's earlier tasks in the fleet, and their money, so that
    the server learns what a task cost whose reply was lost.
    """

    round: Count
    client_id: str
    usage: Usage
    calls_before: Count = 0
    usd_before: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    body: Annotated[ReplyBody, Field(discriminator="kind")]


_ADAPTERS: dict[type, TypeAdapter[Any]] = {Task: TypeAdapter(Task), Reply: TypeAdapter(Reply)}


def encode(message: Task | Reply) -> bytes:
    """The message as bytes on the wire. Raises `WireError` for a number that it can't carry."""
    try:
        packed: bytes = msgpack.packb(_plain(message), use_single_float=True)
    except OverflowError as error:
        raise WireError(f"{message.body.kind}: {error}") from None
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
