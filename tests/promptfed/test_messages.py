"""The wire codec: every message comes back as it was sent, and anything else is a `WireError`."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from promptfed import messages as m
from promptfed.errors import WireError
from promptfed.ledger import Usage
from promptfed.messages import methods, retrieval
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import NewtonSums
from promptfed.prompts.soft import MAX_VECTORS, Projection
from promptfed.prompts.template import SLOT, PromptTemplate
from promptfed.types import Capability, LabelRequest, TextRequest

# Numbers travel as 32-bit floats: only such numbers come back bit by bit.
number = st.floats(width=32, allow_nan=False, allow_infinity=False)
count = st.integers(min_value=0, max_value=2**40)
word = st.text(min_size=1, max_size=8).filter(lambda w: bool(w.strip()))
size = st.integers(min_value=0, max_value=2**31)
texts = st.lists(st.text(max_size=20), max_size=4).map(tuple)
numbers = st.lists(number, max_size=6).map(tuple)


@st.composite
def templates(draw: st.DrawFn, n_words: int = 2) -> PromptTemplate:
    free = st.text(max_size=20).filter(lambda t: SLOT not in t)
    text = draw(free) + SLOT + draw(free)
    words = draw(st.lists(word, min_size=n_words, max_size=n_words, unique=True))
    return PromptTemplate(text=text, words=tuple(words), separator=draw(st.text(max_size=2)))


@st.composite
def prompt_sets(draw: st.DrawFn) -> PromptSet:
    n_labels, n_prompts = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    return PromptSet(
        labels=tuple(draw(st.lists(word, min_size=n_labels, max_size=n_labels, unique=True))),
        prompts=tuple(draw(templates(n_labels)) for _ in range(n_prompts)),
        weights=tuple(draw(number) for _ in range(n_prompts)),
        bias=tuple(draw(number) for _ in range(n_labels)),
    )


prompts = st.lists(templates(), max_size=3).map(tuple)
label_requests = st.builds(LabelRequest, prefix=st.text(), text=st.text(), suffix=st.text(), labels=texts)
text_requests = st.builds(
    TextRequest, prompt=st.text(), max_tokens=count, temperature=number, top_p=number, seed=count, stop=texts
)
many = st.integers(min_value=50, max_value=2**31)  # texts


def upto(most: float) -> st.SearchStrategy[float]:
    return st.floats(0.0, most, width=32)


def sums(low: float, high: float) -> st.SearchStrategy[tuple[float, ...]]:
    """Over 50 texts or more."""
    between = st.floats(float(np.float32(low)), float(np.float32(high)), width=32)
    return st.lists(between, max_size=6).map(tuple)


measured = st.dictionaries(st.text(max_size=10), upto(2**19), max_size=4)


@st.composite
def newton_parts(draw: st.DrawFn) -> m.NewtonPart:
    size = draw(st.integers(0, 4))
    numbers = draw(st.lists(st.floats(-50e6, 50e6, width=32), min_size=size, max_size=size))
    hessian = np.array(draw(st.lists(st.floats(-9, 9), min_size=size * size, max_size=size * size))).reshape(size, size)
    part = NewtonSums(n=draw(many), loss=draw(upto(50e6)), gradient=np.array(numbers), hessian=hessian + hessian.T)
    made = m.NewtonPart.of(part)
    return replace(made, scale=float(np.float32(made.scale)))


counts = st.lists(count, max_size=3).map(tuple)
lessons = st.builds(m.Lessons, texts=texts, shares=st.binary(max_size=30))
TASK_BODIES: dict[type, st.SearchStrategy[Any]] = {
    m.Join: st.builds(m.Join, labels=texts, seed=count),
    m.Write: st.builds(m.Write, requests=st.lists(text_requests, max_size=3).map(tuple)),
    m.Weigh: st.builds(m.Weigh, requests=st.lists(label_requests, max_size=3).map(tuple)),
    m.Vote: st.builds(m.Vote, texts=texts),
    m.Ask: st.builds(m.Ask, prompts=prompts, stop=st.none() | count),
    m.Score: st.builds(
        m.Score,
        prompts=prompts,
        sets=st.lists(st.lists(count, max_size=3).map(tuple), max_size=3).map(tuple),
        stop=count,
        weights=numbers,
        bias=numbers,
    ),
    m.Newton: st.builds(m.Newton, prompts=prompts, stop=st.none() | count, weights=numbers, bias=numbers),
    m.Stack: st.builds(m.Stack, prompt=prompt_sets(), weights=st.tuples(number, number)),
    m.Adopt: st.builds(m.Adopt, prompt=prompt_sets(), stack=st.tuples(number, number)),
    m.Risk: st.builds(m.Risk, single=prompt_sets(), stack=st.tuples(number, number), thresholds=numbers, tried=numbers),
    m.Train: st.builds(m.Train, parameters=numbers, proximal=number),
    m.Teach: st.builds(m.Teach, prompt=prompt_sets(), texts=texts),
    m.Unlearn: st.builds(m.Unlearn),
    m.Distil: st.builds(
        m.Distil,
        prompt=st.none() | prompt_sets(),
        stop=count,
        lessons=st.none() | lessons,
        temperature=st.floats(0.125, 9.0, width=32),
        min_confidence=st.floats(0.0, 1.0, width=32),
    ),
    m.Evaluate: st.builds(
        m.Evaluate,
        arm=st.from_regex(r"[a-z0-9_]{1,20}(@[0-9]{1,9})?", fullmatch=True),
        prompt=st.none() | prompt_sets(),
        parameters=numbers,
        lessons=st.none() | lessons,
    ),
}
REPLY_BODIES: dict[type, st.SearchStrategy[Any]] = {
    m.Joined: st.builds(
        m.Joined,
        fm=st.text(),
        encoder=st.text(),
        capabilities=st.just((Capability.TEXT,)),
        n_train=size,
        n_test=size,
        labels=texts,
        n_dropped=size,
    ),
    m.Written: st.builds(m.Written, texts=texts),
    m.Weighed: st.builds(
        m.Weighed,
        logprobs=st.lists(numbers, max_size=3).map(tuple),
        n_tokens=st.lists(st.lists(count, max_size=3).map(tuple), max_size=3).map(tuple),
    ),
    m.Votes: st.builds(m.Votes, n_labels=count, shares=st.binary(max_size=30)),
    m.Scored: st.builds(m.Scored, n=many, total=sums(0.0, 50.0), diff=sums(-50.0, 50.0), diff_sq=sums(0.0, 50.0)),
    m.MomentSums: st.builds(m.MomentSums, n=many, total=sums(-50e6, 50e6), squares=sums(0.0, 50e12)),
    m.NewtonPart: newton_parts(),
    m.Adopted: st.builds(m.Adopted, n_calibration=count),
    m.Trained: st.builds(m.Trained, n=count, parameters=sums(-1e6, 1e6)),
    m.RiskCounts: st.builds(m.RiskCounts, n=count, answered=counts, wrong=counts),
    m.Unlearned: st.builds(m.Unlearned),
    m.Distilled: st.builds(m.Distilled, n_lessons=count, n=many, before=upto(50), after=upto(50), diff_sq=upto(50)),
    m.Evaluated: st.builds(m.Evaluated, n=count, values=measured, errors=measured, calls_per_prediction=upto(2**19)),
    m.Failed: st.builds(m.Failed, reason=st.sampled_from(["ValueError", "FMError"])),
}


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, within its bounds, that the wire can carry bit by bit."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        rules = [rule for note in notes if isinstance(note, FieldInfo) for rule in note.metadata]
        bounds = {
            name: getattr(rule, name) for rule in rules for name in ("ge", "gt", "le", "lt") if hasattr(rule, name)
        }
        if inner is int:
            return st.integers(bounds.get("ge", 0), bounds.get("le", 2**40))
        low, high = bounds.get("ge", bounds.get("gt", 0.0)), bounds.get("le", bounds.get("lt", 2.0**20))
        return st.floats(low, high, width=32, exclude_min="gt" in bounds, exclude_max="lt" in bounds)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if inner[-1] is Ellipsis:
            return st.lists(of_type(inner[0]), max_size=3).map(tuple)
        return st.tuples(*map(of_type, inner))
    if kind is PromptTemplate:
        return templates()
    if kind is Projection:
        least = {"dimension": 2, "n_vectors": 1, "hidden": 1}
        sizes = {name: st.integers(low, MAX_VECTORS) for name, low in least.items()}
        return st.builds(Projection, seed=count, spread=number, start=number, **sizes)
    return {str: st.text(max_size=20), int: count, float: number, bytes: st.binary(max_size=30), bool: st.booleans()}[
        kind
    ]


def of_message(kind: type) -> st.SearchStrategy[Any]:
    """Messages of a kind, field by field."""
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{f.name: of_type(hints[f.name]) for f in fields(kind)})


TASK_BODIES |= {kind: of_message(kind) for kind in get_args(methods.TaskBody)}
REPLY_BODIES |= {kind: of_message(kind) for kind in get_args(methods.ReplyBody)}


@st.composite
def found(draw: st.DrawFn) -> retrieval.Found:
    rng = np.random.default_rng(draw(count))
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 4)))
    return retrieval.Found.of(rng.normal(size=shape), rng.integers(-1, 9, size=shape))


shown = st.lists(st.tuples(st.text(max_size=9), count, st.text(max_size=9)), max_size=4).map(
    lambda rows: retrieval.Shown(**{name: tuple(r[i] for r in rows) for i, name in enumerate(SHOWN)})
)
SHOWN = ("doc_ids", "places", "texts")
TASK_BODIES |= {kind: of_message(kind) for kind in get_args(retrieval.TaskBody)}
REPLY_BODIES |= {
    retrieval.Described: of_message(retrieval.Described),
    retrieval.Found: found(),
    retrieval.Shown: shown,
}


def tasks(body: st.SearchStrategy[Any]) -> st.SearchStrategy[m.Task]:
    name = st.text("abcz019_-", min_size=1, max_size=64)
    return st.builds(
        m.Task, round=count, client_id=st.text(max_size=10), run=name, fleet=name, grant=count, limit=count, body=body
    )


def replies(body: st.SearchStrategy[Any]) -> st.SearchStrategy[m.Reply]:
    return st.builds(
        m.Reply, round=count, client_id=st.text(max_size=10), usage=st.builds(Usage, fm_calls=count), body=body
    )


TEMPLATE = PromptTemplate(text="Review: {text}\nLabel:", words=("bad", "good"))
TASK = m.Task(
    round=3,
    client_id="north",
    run="run",
    fleet="tuning",
    grant=7,
    limit=9,
    body=m.Score(prompts=(TEMPLATE,), sets=((0,),), stop=7, weights=(1.5,), bias=(0.25, -0.25)),
)
REPLY = m.Reply(
    round=3, client_id="north", usage=Usage(fm_calls=7), body=m.Scored(n=7, total=(5.25,), diff=(0.0,), diff_sq=(0.0,))
)


def test_every_message_of_the_module_is_covered_here() -> None:
    assert set(TASK_BODIES) == set(get_args(m.TaskBody))
    assert set(REPLY_BODIES) == set(get_args(m.ReplyBody))


@pytest.mark.parametrize("kind", TASK_BODIES, ids=lambda k: k.__name__)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_a_task_comes_back_as_it_was_sent(kind: type, data: st.DataObject) -> None:
    task = data.draw(tasks(TASK_BODIES[kind]))

    assert m.decode_task(m.encode(task)) == task


@pytest.mark.parametrize("kind", REPLY_BODIES, ids=lambda k: k.__name__)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_a_reply_comes_back_as_it_was_sent(kind: type, data: st.DataObject) -> None:
    reply = data.draw(replies(REPLY_BODIES[kind]))

    assert m.decode_reply(m.encode(reply)) == reply


def test_numbers_travel_as_32_bit_floats() -> None:
    sent = m.Reply(round=1, client_id="a", usage=Usage(), body=m.Trained(n=1, parameters=(0.1,) * 1000))

    received = m.decode_reply(m.encode(sent))

    assert isinstance(received.body, m.Trained)
    assert received.body.parameters[0] == pytest.approx(0.1, rel=1e-7)
    # 5 bytes a number (a type byte and 4 of the number), and less than 100 for everything else.
    assert 5000 <= len(m.encode(sent)) < 5300


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (m.Scored, {"total": (5.1,)}),
        (m.Scored, {"total": (-0.1,)}),
        (m.Scored, {"diff": (-5.1,)}),
        (m.Scored, {"diff_sq": (1e30,)}),
        (m.MomentSums, {"total": (3e38,), "squares": ()}),
        (m.MomentSums, {"total": (), "squares": (-1.0,)}),
        (m.Trained, {"parameters": (3e38,)}),
        (m.Distilled, {"before": 6.0}),
        (m.Evaluated, {"values": {"accuracy": 1.7e38}}),
        (m.Evaluated, {"errors": {"accuracy": -1.0}}),
        (m.NewtonPart, {"loss": 1e30}),
        (m.NewtonPart, {"scale": 1e30}),
    ],
)
def test_a_sum_that_can_not_be_one_is_a_wire_error(kind: Any, changes: dict[str, Any]) -> None:
    fields_of: dict[Any, dict[str, Any]] = {
        m.Scored: {"total": (5.0,), "diff": (-5.0,), "diff_sq": (5.0,)},
        m.MomentSums: {"total": (-5e6,), "squares": (5e12,)},
        m.Trained: {"parameters": (-1e6,)},
        m.Distilled: {"n_lessons": 3, "before": 5.0, "after": 0.0, "diff_sq": 5.0},
        m.Evaluated: {"values": {"accuracy": 1.0}, "errors": {"accuracy": 0.0}, "calls_per_prediction": 3.0},
        m.NewtonPart: {"loss": 5e6, "gradient": (), "scale": 1.0, "hessian": b""},
    }
    kind(n=5, **fields_of[kind])

    with pytest.raises(WireError, match="a sum over"):
        kind(n=5, **{**fields_of[kind], **changes})


def test_a_number_that_is_too_large_for_the_wire_is_a_wire_error() -> None:
    with pytest.raises(WireError, match="score"):
        m.encode(replace(TASK, body=replace(TASK.body, weights=(1e300,))))


def test_equal_messages_have_equal_bytes() -> None:
    assert m.encode(TASK) == m.encode(m.decode_task(m.encode(TASK)))


# ---------------------------------------------------------------- what is not a message


@given(data=st.binary(max_size=60))
@settings(deadline=None, max_examples=100)
def test_noise_is_a_wire_error(data: bytes) -> None:
    for decode in (m.decode_task, m.decode_reply):
        with pytest.raises(WireError):
            decode(data)


@pytest.mark.parametrize("cut", [1, 2, 10, 40, len(m.encode(TASK)) - 1, len(m.encode(TASK))])
def test_a_task_that_was_cut_off_is_a_wire_error(cut: int) -> None:
    with pytest.raises(WireError):
        m.decode_task(m.encode(TASK)[:-cut])


def test_every_cut_of_a_reply_is_a_wire_error() -> None:
    whole = m.encode(REPLY)

    for length in range(len(whole)):
        with pytest.raises(WireError):
            m.decode_reply(whole[:length])


def test_bytes_after_the_message_are_a_wire_error() -> None:
    with pytest.raises(WireError):
        m.decode_reply(m.encode(REPLY) + b"\x00")


@given(place=st.integers(0, len(m.encode(TASK)) - 1), value=st.integers(0, 255))
@settings(deadline=None, max_examples=200)
def test_a_changed_byte_gives_a_task_or_a_wire_error_and_nothing_else(place: int, value: int) -> None:
    changed = bytearray(m.encode(TASK))
    changed[place] = value

    try:
        decoded = m.decode_task(bytes(changed))
    except WireError:
        return

    assert isinstance(decoded, m.Task)


@given(place=st.integers(0, len(m.encode(REPLY)) - 1), value=st.integers(0, 255))
@settings(deadline=None, max_examples=200)
def test_a_changed_byte_gives_a_reply_or_a_wire_error_and_nothing_else(place: int, value: int) -> None:
    changed = bytearray(m.encode(REPLY))
    changed[place] = value

    try:
        decoded = m.decode_reply(bytes(changed))
    except WireError:
        return

    assert isinstance(decoded, m.Reply)


@pytest.mark.parametrize("depth", [100, 2_000, 100_000])
def test_endless_nesting_is_a_wire_error(depth: int) -> None:
    with pytest.raises(WireError):
        m.decode_task(b"\x91" * depth)


def test_a_huge_announced_length_is_a_wire_error() -> None:
    with pytest.raises(WireError):
        m.decode_task(b"\xdd\xff\xff\xff\xff")  # "an array of 2**32 - 1 items follows"


def _packed(message: m.Task | m.Reply, **changes: Any) -> bytes:
    """The message with top-level fields replaced, or with ``body`` fields replaced under ``body=``."""
    raw = asdict(message)
    body = changes.pop("body", {})
    raw.update(changes)
    if isinstance(body, dict):
        raw["body"].update(body)
    else:
        raw["body"] = body
    packed: bytes = msgpack.packb({k: v for k, v in raw.items() if v is not ...})
    return packed


def test_the_helper_packs_what_the_codec_reads() -> None:
    assert m.decode_task(_packed(TASK)) == TASK
    assert m.decode_reply(_packed(REPLY)) == REPLY


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"body": {"surprise": 1}},
        {"client_id": ...},
        {"body": None},
        {"body": "scored"},
        {"body": []},
        {"body": {"kind": "no such kind"}},
        {"body": {"kind": None}},
        {"body": {"kind": "failed"}},
        {"body": {"total": 1.0}},
        {"body": {"total": ["much"]}},
        {"body": {"total": None}},
        {"body": {"n": "seven"}},
        {"body": {"n": 7.5}},
        {"fm_calls": None},
        {"fm_calls": [1]},
        {"client_id": 5},
        {"client_id": ["north"]},
    ],
)
def test_a_reply_with_a_wrong_field_is_a_wire_error(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        m.decode_reply(_packed(REPLY, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"fleet": "../holiday"},
        {"run": "x" * 65},
        {"run": ""},
        {"grant": "many"},
        {"body": {"surprise": 1}},
        {"body": {"prompts": [{"text": "no slot", "words": ["a", "b"], "separator": " "}]}},
        {"body": {"prompts": [{"text": "{text}", "words": ["a"], "separator": " "}]}},
        {"body": {"prompts": [{"text": "{text}", "words": ["a", "b"], "separator": " ", "extra": 1}]}},
        {"body": {"sets": [0]}},
        {"body": {"stop": None}},
    ],
)
def test_a_task_with_a_wrong_field_is_a_wire_error(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        m.decode_task(_packed(TASK, **changes))


def test_an_inconsistent_prompt_set_is_a_wire_error() -> None:
    body = {
        "kind": "adopt",
        "prompt": {"labels": ["a", "b"], "prompts": [asdict(TEMPLATE)], "weights": [1.0, 1.0], "bias": [0.0, 0.0]},
    }
    data = msgpack.packb({"round": 1, "client_id": "a", "run": "run", "fleet": "tuning", "grant": 0, "body": body})

    with pytest.raises(WireError):
        m.decode_task(data)


def test_a_task_is_not_a_reply() -> None:
    with pytest.raises(WireError):
        m.decode_reply(m.encode(TASK))
    with pytest.raises(WireError):
        m.decode_task(m.encode(REPLY))


def test_the_error_names_the_field_and_never_quotes_the_value() -> None:
    data = _packed(REPLY, body={"n": "a private text"})

    with pytest.raises(WireError) as caught:
        m.decode_reply(data)

    assert "body" in str(caught.value)
    assert ".n" in str(caught.value)
    assert "private" not in str(caught.value)
    assert caught.value.__cause__ is None
