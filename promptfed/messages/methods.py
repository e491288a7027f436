"""Client tasks of single methods, beside the standard ones, and their replies.

Vectors of numbers travel as little-endian 32-bit floats in one ``bytes`` (`packed`): four bytes a number. As in `core`,
no reply carries a text of the client's; where a foundation model wrote from one, the leak gate (`clients.gate`) stands
before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from promptfed.errors import WireError
from promptfed.ledger import Count
from promptfed.messages.core import Message
from promptfed.prompts.soft import Projection
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FloatArray


def packed(values: FloatArray) -> bytes:
    """Numbers as they travel."""
    return np.asarray(values, dtype="<f4").tobytes()


def unpacked(data: bytes, *shape: int) -> FloatArray:
    """Numbers as they came, float64 of ``shape``. Raises `WireError` for another size, or one that is not finite."""
    if len(data) != 4 * int(np.prod(shape)):
        raise WireError(f"{len(data)} bytes for an array of shape {shape}")
    values = np.frombuffer(data, dtype="<f4").astype(np.float64).reshape(shape)
    if not np.isfinite(values).all():
        raise WireError("an array holds numbers that are not finite")
    return values


# ---------------------------------------------------------------- n-gram slots: fedone_bdpl, fedone_gs_bdpl


@dataclass(frozen=True, slots=True, kw_only=True)
class CountNgrams(Message):
    """Say in how many of your texts each of these public n-grams stands, and 0 where it is in few."""

    ngrams: tuple[str, ...]
    kind: Literal["count_ngrams"] = "count_ngrams"


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramCounts(Message):
    """One number an n-gram, out of ``n`` texts."""

    n: Count
    counts: tuple[Count, ...]
    kind: Literal["ngram_counts"] = "ngram_counts"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStep(Message):
    """Take ``n_steps`` policy-gradient steps of the slots' logits on your texts: ``n_samples`` prompts are drawn a step
    and scored on ``n_texts`` texts.

    ``logits`` are those of ``n_slots`` categorical slots over ``vocabulary``, (n_slots, N) `packed`; what is drawn
    stands before ``template``, whose label scores count ``weight`` times. ``estimator`` is REINFORCE, or through the
    Gumbel-softmax at ``temperature``. A step is ``learning_rate`` times the gradient, no longer than
    ``max_step``; no slot's entropy falls under the share ``entropy_floor`` of the largest.
    """

    template: PromptTemplate
    weight: float
    vocabulary: tuple[str, ...]
    n_slots: Count
    logits: bytes
    n_samples: Count
    n_texts: Count
    n_steps: Count
    learning_rate: float
    max_step: float
    estimator: Literal["reinforce", "gumbel"]
    temperature: float
    entropy_floor: Annotated[float, Field(ge=0, lt=1)]
    seed: Count
    kind: Literal["policy_step"] = "policy_step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Message):
    """The slots' logits after the steps, (n_slots, N) `packed`; the mean loss of the prompts drawn, as far as it is
    known; and how many texts the client has."""

    n: Count
    logits: bytes
    loss: float
    kind: Literal["policy"] = "policy"


# ---------------------------------------------------------------- soft prompts: fedbpt, fedavg_bbt

CovarianceForm = Literal["full", "separable", "low_rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolve(Message):
    """Run CMA-ES on the intrinsic vector of a soft prompt before ``template``: ``n_iterations`` of ``population``.

    ``mean`` (d,), ``sigma`` and ``covariance`` (its ``form`` says how it is packed: `promptfed.strategies.evolution`)
    are the distribution to start from. A vector's fitness is its loss on ``n_texts`` texts, over that on the same texts
    with a share ``mask_rate`` of the words hidden; 0 leaves the second out. The loss is that of label scores as they
    are, or, ``calibrated``, of those under batch calibration.
    """

    template: PromptTemplate
    projection: Projection
    mean: bytes
    sigma: Annotated[float, Field(gt=0)]
    form: CovarianceForm
    covariance: bytes
    population: Count
    n_iterations: Count
    n_texts: Count
    mask_rate: Annotated[float, Field(ge=0, lt=1)]
    calibrated: bool
    seed: Count
    kind: Literal["evolve"] = "evolve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolved(Message):
    """The local mean (d,), `packed`, its fitness on ``n`` texts (lower is better), and the step size of each
    iteration."""

    n: Count
    mean: bytes
    fitness: float
    sigmas: tuple[float, ...]
    kind: Literal["evolved"] = "evolved"


# ---------------------------------------------------------------- textual feedback: fedtextgrad, fed_gepa


@dataclass(frozen=True, slots=True, kw_only=True)
class Reflect(Message):
    """Let the FM say what is wrong with a prompt on ``n_examples`` of your texts, and rewrite its instruction.

    ``instruction`` is what may change in ``template``, which begins with it (`promptfed.prompts.feedback`). ``n_steps``
    times; a rewrite that is not better on the same texts, or that the leak gate stops, is given up. Texts are of those
    from number ``start`` on. ``weight`` and ``bias`` (K,) are the prompt's pooled calibration. ``known`` are words that
    anybody may read, of the public texts: the leak gate lets them through one by one.
    """

    template: PromptTemplate
    instruction: str
    weight: float
    bias: tuple[float, ...]
    known: tuple[str, ...]
    start: Count
    n_examples: Count
    n_steps: Count
    max_tokens: Count
    max_words: Count
    seed: Count
    kind: Literal["reflect"] = "reflect"

    @staticmethod
    def most_fm_calls(n_examples: int, n_steps: int) -> int:
        """What such a task may cost, and is to be granted: the texts once with the prompt as it is, and in each step a
        critique, a rewrite and the texts again."""
        return n_examples + n_steps * (2 + n_examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reflected(Message):
    """The instruction as it came out, empty where nothing better was found; what was stopped by the leak gate, by
    number."""

    instruction: str
    n_stopped: Count
    kind: Literal["reflected"] = "reflected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wins(Message):
    """Say on how many of your texts [0, stop) each prompt is (alone or with others) the best, from label scores or
    answers that you have. ``weights`` and ``bias`` as in `Score`. No FM call."""

    prompts: tuple[PromptTemplate, ...]
    stop: int
    weights: tuple[float, ...]
    bias: tuple[float, ...]
    kind: Literal["wins"] = "wins"


@dataclass(frozen=True, slots=True, kw_only=True)
class Won(Message):
    """A number a prompt, out of ``n`` texts; a text with several best prompts is shared among them."""

    n: Count
    shares: tuple[float, ...]
    kind: Literal["won"] = "won"


# ---------------------------------------------------------------- in-context learning: fed_icl; bandits: fedpob


@dataclass(frozen=True, slots=True, kw_only=True)
class Relabel(Message):
    """Let the FM label these public ``texts`` with a prompt of ``n_shots`` of your own labelled texts a label and the
    ``context`` (public text, label) that all share. Your own texts go to the FM only."""

    texts: tuple[str, ...]
    context: tuple[tuple[str, Count], ...]
    instruction: str
    fields: tuple[str, str]
    words: tuple[str, ...]
    n_shots: Count
    seed: Count
    kind: Literal["relabel"] = "relabel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed(Message):
    """Vectors of these public texts (prompts, say), by your encoder, projected to ``dimension`` numbers."""

    texts: tuple[str, ...]
    dimension: Count
    seed: Count
    kind: Literal["embed"] = "embed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded(Message):
    """(n, dimension) `packed`."""

    vectors: bytes
    kind: Literal["embedded"] = "embedded"


# ---------------------------------------------------------------- private votes: dp_opt_vote, aug_pe


@dataclass(frozen=True, slots=True, kw_only=True)
class NextWord(Message):
    """Let your own labelled texts vote for the next word of a prompt that is being written.

    Each text is drawn by a coin of its own, with ``sampling_rate``, and then goes into one of ``n_groups``. Each group
    asks the FM, in a meta-prompt with its texts (``max_texts`` at most), which of the public ``candidates`` goes on
    after ``written``, in an instruction like those ``shown``, and is one vote: a text more moves one vote at most.
    ``fields`` and ``words`` are those of the prompt. The coins are the client's secret, as is the noise, of standard
    deviation ``noise``.

    ``release`` is the task's number among the releases of the run: two equal tasks get the same noise.
    """

    shown: tuple[str, ...]
    written: str
    fields: tuple[str, str]
    words: tuple[str, ...]
    candidates: tuple[str, ...]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    n_groups: Count
    max_texts: Count
    noise: Annotated[float, Field(ge=0)]
    release: Count
    kind: Literal["next_word"] = "next_word"


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestVotes(Message):
    """Let each of your texts vote, under its own label, for the nearest of these public or FM-written ``texts``.

    Each text has one vote, so a text more changes one number by one. The noise, of standard deviation ``noise``, is the
    client's secret. ``release`` as in `NextWord`.
    """

    texts: tuple[str, ...]
    noise: Annotated[float, Field(ge=0)]
    release: Count
    kind: Literal["nearest_votes"] = "nearest_votes"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyVotes(Message):
    """One whole number a candidate word, or a label and candidate text (label by label), noise and all, `packed`."""

    votes: bytes
    kind: Literal["noisy_votes"] = "noisy_votes"


TaskBody = CountNgrams | PolicyStep | Evolve | Reflect | Wins | Relabel | Embed | NextWord | NearestVotes
ReplyBody = NgramCounts | Policy | Evolved | Reflected | Won | Embedded | NoisyVotes
