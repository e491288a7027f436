"""The standard client tasks and their replies: what methods are written from, and what every run does besides.

No task asks for a text and no reply carries one: see the table in docs/boundaries.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field

from promptfed.errors import WireError
from promptfed.ledger import Count
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import NewtonSums
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FloatArray, LabelRequest, SoftSpace, TextRequest

# What a client may use: the tuned set, the best of the clients like it, the best for itself, or tuned and own together.
Choice = Literal["global", "cluster", "own", "mixed"]


# How many texts a client can have.
Size = Annotated[int, Field(ge=0, le=2**31)]
# What a number of one text may be that has no bounds of its own: more than any honest one, and few enough to add up.
MOST = 1e6


def within(n: int, low: float, high: float, *sums: float) -> None:
    """Raise `WireError` for a sum over ``n`` texts, each of which has ``low`` to ``high``, that can't be one."""
    least, most = (n * bound * (1 + 1e-5) for bound in (low, high))  # numbers travel as 32-bit floats
    if any(not least - 1e-3 <= value <= most + 1e-3 for value in sums):
        raise WireError(f"a sum over {n} texts is not within {n * low:g} and {n * high:g}")


class Message:
    """What every message has: no field that is not its own, no number that is not finite."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


# ---------------------------------------------------------------- tasks: server to client


@dataclass(frozen=True, slots=True, kw_only=True)
class Join(Message):
    """Say how many texts you hold and which labels occur. ``labels`` are the task's, in the order that counts from now
    on, or none where the task is generation; ``seed`` is the run's."""

    labels: tuple[str, ...]
    seed: Count
    kind: Literal["join"] = "join"


@dataclass(frozen=True, slots=True, kw_only=True)
class Write(Message):
    """Let the FM write. The prompts hold public text only."""

    requests: tuple[TextRequest, ...]
    kind: Literal["write"] = "write"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weigh(Message):
    """Let the FM say how likely words are after public text."""

    requests: tuple[LabelRequest, ...]
    kind: Literal["weigh"] = "weigh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote(Message):
    """Let your domain model read these public or FM-written texts."""

    texts: tuple[str, ...]
    kind: Literal["vote"] = "vote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask(Message):
    """Ask the FM for the label scores of ``prompts`` on your texts [0, stop), and send their moments: none of prompts
    that generate.

    Texts are numbered in the client's own shuffled order. What the client has already is not asked for again. Without
    ``stop`` nothing is asked: the moments are over the texts that all ``prompts`` were scored on before.
    """

    prompts: tuple[PromptTemplate, ...]
    stop: int | None
    kind: Literal["ask"] = "ask"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(Message):
    """Score ``sets`` of ``prompts`` (tuples of indices) on your texts [0, stop), from label scores that you have.

    ``weights`` (one a prompt) and ``bias`` (flat, J x K) are each prompt's pooled calibration, from which the client's
    own cross-fitted one starts. No FM call, unless the task grants some: then scores that you lack, because an `Ask`
    did not reach you, are asked first, if the grant is enough. ``differences``: to the first set, too. ``half``: only
    on the first or the second half of them.
    """

    prompts: tuple[PromptTemplate, ...]
    sets: tuple[tuple[int, ...], ...]
    stop: int
    weights: tuple[float, ...]
    bias: tuple[float, ...]
    differences: bool = True
    half: Literal[0, 1] | None = None
    kind: Literal["score"] = "score"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer(Message):
    """What a client may choose for itself in place of the tuned set: one of the ``sets`` of ``score``, from label
    scores that it has.

    ``alike``: which of the sets is best for the group of clients that this one is of, found on all their texts, on the
    first half of each one's, and on the second; empty where there are no groups.
    """

    score: Score
    alike: tuple[Count, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Newton(Message):
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
class Stack(Message):
    """Your part of one Newton step of the two ``weights`` of FM and domain model, which all clients share."""

    prompt: PromptSet
    weights: tuple[float, float]
    kind: Literal["stack"] = "stack"


# The stages of a cascade by name, the cheapest first.
STAGES = ("dm", "fm_single_dm", "fm_dm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cascade(Message):
    """How sure the domain model alone, and with ``single`` (the best prompt), have to be to answer (`clients.cascade`),
    and what share of their answers may be wrong."""

    single: PromptSet
    thresholds: tuple[float, ...]
    target: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Risk(Message):
    """Of your labelled texts that reach the stage after ``thresholds``: say how many it would answer if it had to be as
    sure as each of ``tried``, and how many wrongly. No FM call."""

    single: PromptSet
    stack: tuple[float, float]
    thresholds: tuple[float, ...]
    tried: tuple[float, ...]
    kind: Literal["risk"] = "risk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt(Message):
    """Take the tuned prompt: fit your own calibration on it, and keep that, the weights of FM and domain model, and the
    ``cascade``. With an ``offer``, choose what you will use yourself. No FM call."""

    prompt: PromptSet
    stack: tuple[float, float]
    offer: Offer | None = None
    cascade: Cascade | None = None
    kind: Literal["adopt"] = "adopt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Train(Message):
    """Train your domain model for a few steps, from these ``parameters`` or, if they are empty, from where it starts;
    ``proximal`` holds it to them. The model that you use stays as it is."""

    parameters: tuple[float, ...]
    proximal: float = 0.0
    kind: Literal["train"] = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons(Message):
    """Public or FM-written ``texts`` with the probability of each label, in 255ths, row by row: what others' models, or
    the FM, say of them."""

    texts: tuple[str, ...]
    shares: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Teach(Message):
    """Ask the FM about these public texts with ``prompt``, and say what it says under the pooled calibration. Costs a
    call a text and prompt."""

    prompt: PromptSet
    texts: tuple[str, ...]
    kind: Literal["teach"] = "teach"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distil(Message):
    """Ask the FM about your unlabelled texts [0, stop) with ``prompt``, and let your domain model learn what it says,
    beside your labelled texts and ``lessons``; from now on, this is your domain model. Without ``prompt``, of the
    lessons alone.

    The FM's calibrated log-odds are divided by ``temperature``; a text that it is less sure of than
    ``min_confidence`` is left out.
    """

    prompt: PromptSet | None
    stop: Count
    lessons: Lessons | None
    temperature: Annotated[float, Field(gt=0)]
    min_confidence: Annotated[float, Field(ge=0, le=1)]
    kind: Literal["distil"] = "distil"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlearn(Message):
    """Go back to the domain model that you had before the last `Distil`."""

    kind: Literal["unlearn"] = "unlearn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate(Message):
    """Measure one arm on your held-out texts. ``prompt``, ``stack``, ``parameters``, ``lessons``, ``cascade`` and
    ``offer`` where the arm needs them; with ``stop``, the client's own calibration is fitted on its texts [0, stop)
    only, as it could have been at the time."""

    arm: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}(@[0-9]{1,12})?$")]  # names a file at the client
    prompt: PromptSet | None = None
    stack: tuple[float, ...] = ()
    parameters: tuple[float, ...] = ()
    lessons: Lessons | None = None
    cascade: Cascade | None = None
    stop: int | None = None
    offer: Offer | None = None
    kind: Literal["evaluate"] = "evaluate"


# ---------------------------------------------------------------- replies: client to server


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(Message):
    """``fm`` is the id of the foundation model that the client asks, ``capabilities`` what that can do; ``encoder`` is
    what its domain model, of kind ``domain_model``, reads with; ``soft_space`` is where soft prompts live, if the model
    takes any; ``is_priced`` says whether the client knows what its answers cost."""

    fm: str
    encoder: str
    capabilities: tuple[Capability, ...]
    n_train: Size
    n_test: Size
    labels: tuple[str, ...]
    n_dropped: Size
    n_unlabelled: Size = 0
    domain_model: str = ""
    soft_space: SoftSpace | None = None
    is_priced: bool = False
    kind: Literal["joined"] = "joined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written(Message):
    """One text a request; empty where the FM failed."""

    texts: tuple[str, ...]
    kind: Literal["written"] = "written"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed(Message):
    """Log-probabilities of the labels and their numbers of tokens, one row a request; an empty row where the FM failed,
    or does not say."""

    logprobs: tuple[tuple[float, ...], ...]
    n_tokens: tuple[tuple[Count, ...], ...]
    kind: Literal["weighed"] = "weighed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes(Message):
    """The probability of each label for each text, in 255ths, row by row: the domain model's, or what the FM says."""

    n_labels: Count
    shares: bytes
    kind: Literal["votes"] = "votes"

    @classmethod
    def of(cls, proba: FloatArray) -> Votes:
        """``proba`` (n, K)."""
        return cls(n_labels=proba.shape[1], shares=np.rint(proba * 255).astype(np.uint8).tobytes())

    def fits(self, n: int, n_labels: int) -> bool:
        """Whether these are of ``n`` texts and so many labels."""
        return (len(self.shares), self.n_labels) == (n * n_labels, n_labels)

    @property
    def proba(self) -> FloatArray:
        """(n, K), of votes that fit."""
        return np.frombuffer(self.shares, dtype=np.uint8).reshape(-1, self.n_labels) / 255.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Message):
    """Bounded sums over ``n`` texts for each set: of the score (in [0, 1], higher is better), and of the difference to
    the first set, plain and squared, where those were asked for."""

    n: Count
    total: tuple[float, ...]
    diff: tuple[float, ...]
    diff_sq: tuple[float, ...]
    kind: Literal["scored"] = "scored"

    def __post_init__(self) -> None:
        within(self.n, 0.0, 1.0, *self.total, *self.diff_sq)
        within(self.n, -1.0, 1.0, *self.diff)


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentSums(Message):
    """Sums over ``n`` texts of the prompts' centred label scores, flat (J, K); and of their squares (J,)."""

    n: Count
    total: tuple[float, ...]
    squares: tuple[float, ...]
    kind: Literal["moment_sums"] = "moment_sums"

    def __post_init__(self) -> None:
        within(self.n, -MOST, MOST, *self.total)
        within(self.n, 0.0, MOST**2, *self.squares)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewtonPart(Message):
    """Loss, gradient (J+K,) and Hessian of the negative log-likelihood, summed over ``n`` texts.

    The Hessian is symmetric and needs no more than three digits: its upper triangle, row by row, in 16-bit floats that
    are multiples of ``scale``. Raises `WireError` for another size, and for numbers that are not finite.
    """

    n: Count
    loss: float
    gradient: tuple[float, ...]
    scale: float
    hessian: bytes
    kind: Literal["newton_part"] = "newton_part"

    def __post_init__(self) -> None:
        size = len(self.gradient)
        within(self.n, -MOST, MOST, self.loss, *self.gradient)
        within(max(self.n, 1), 0.0, MOST**2, self.scale)  # 1 where the Hessian is 0
        if len(self.hessian) != size * (size + 1) or not np.isfinite(np.frombuffer(self.hessian, dtype="<f2")).all():
            raise WireError(f"no triangle of a Hessian of {size} parameters")

    @classmethod
    def of(cls, part: NewtonSums) -> NewtonPart:
        upper = part.hessian[np.triu_indices(len(part.gradient))]
        scale = float(np.abs(upper).max(initial=0.0)) or 1.0
        hessian = (upper / scale).astype("<f2").tobytes()
        return cls(n=part.n, loss=part.loss, gradient=tuple(part.gradient.tolist()), scale=scale, hessian=hessian)

    @property
    def sums(self) -> NewtonSums:
        size = len(self.gradient)
        hessian = np.zeros((size, size))
        hessian[np.triu_indices(size)] = np.frombuffer(self.hessian, dtype="<f2").astype(np.float64) * self.scale
        hessian += np.triu(hessian, 1).T
        return NewtonSums(n=self.n, loss=self.loss, gradient=np.array(self.gradient), hessian=hessian)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted(Message):
    """``choice`` is what the client uses: the tuned set, or one of its own choosing (`clients.personal`)."""

    n_calibration: Count
    choice: Choice = "global"
    kind: Literal["adopted"] = "adopted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Message):
    """A domain model's flat parameters, and how many texts it was trained on. None of a kind that has none."""

    n: Count
    parameters: tuple[float, ...]
    kind: Literal["trained"] = "trained"

    def __post_init__(self) -> None:
        within(1, -MOST, MOST, *self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled(Message):
    """How many lessons there were in all, the client's own unlabelled texts among them; and over ``n`` labelled texts,
    each seen by a model that it was not learned from, the sum of scores (1 - Brier/2, higher is better) before and
    after, and of the squared differences."""

    n_lessons: Count
    n: Count
    before: float
    after: float
    diff_sq: float
    kind: Literal["distilled"] = "distilled"

    def __post_init__(self) -> None:
        within(self.n, 0.0, 1.0, self.before, self.after, self.diff_sq)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlearned(Message):
    """Done."""

    kind: Literal["unlearned"] = "unlearned"


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskCounts(Message):
    """Out of ``n`` texts, for each threshold that was tried."""

    n: Count
    answered: tuple[Count, ...]
    wrong: tuple[Count, ...]
    kind: Literal["risk_counts"] = "risk_counts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Message):
    """Per metric: the value on ``n`` texts and its bootstrap standard error. Of a cascade, how many texts each stage
    ``answered``, and how many of them ``wrong``."""

    n: Count
    values: Mapping[str, float]
    errors: Mapping[str, float]
    calls_per_prediction: float
    answered: tuple[Count, ...] = ()
    wrong: tuple[Count, ...] = ()
    kind: Literal["evaluated"] = "evaluated"

    def __post_init__(self) -> None:
        within(1, -MOST, MOST, *self.values.values())
        within(1, 0.0, MOST, *self.errors.values(), self.calls_per_prediction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message):
    """The client could not do the task. ``reason`` is an exception's class, never its text."""

    reason: Annotated[str, Field(pattern=r"^\w{1,100}$")]
    kind: Literal["failed"] = "failed"
