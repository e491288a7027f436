"""Soft prompts: vectors that stand where the embeddings of a prompt's first tokens would.

They are made, checked and read here; a foundation model takes them with `LabelRequest.soft` and `TextRequest.soft`. A
server that computes on whatever it is sent can crash on a wrong shape or on a number that is not finite, so nothing
that fails a check here is ever sent.

A search without gradients can't look for thousands of numbers: it looks for an intrinsic vector of some dozens, and a
random `Projection` makes the vectors of it (BBT: Sun et al., ICML 2022, arXiv 2201.03514, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from promptfed.errors import ConfigError
from promptfed.types import FloatArray, SoftPrompt, SoftSpace

# A soft prompt beyond this many vectors would leave no room for text in a small model's context.
MAX_VECTORS = 512
# Embeddings of tokens have norms of a few units; one far beyond them is a search that has run away.
MAX_NORM = 1_000.0


def soft_prompt(vectors: npt.ArrayLike, hidden: int | None = None) -> SoftPrompt:
    """A soft prompt of ``vectors`` (n, hidden), rounded to float32. ``hidden``: the width that the model has.

    Raises `ConfigError` for another shape, a type that is not a real number, values that are not finite, and vectors
    whose norm is beyond `MAX_NORM`.
    """
    array = np.asarray(vectors)
    if array.dtype.kind not in "fiu":
        raise ConfigError(f"a soft prompt holds real numbers; got an array of {array.dtype}")
    if array.ndim != 2 or not 1 <= len(array) <= MAX_VECTORS or array.shape[1] < 1:
        raise ConfigError(f"a soft prompt has shape (n, hidden) with 1 to {MAX_VECTORS} vectors; got {array.shape}")
    with np.errstate(over="ignore"):  # what does not fit float32 is infinite, and refused below
        rounded = array.astype("<f4")
    made = SoftPrompt(n=rounded.shape[0], hidden=rounded.shape[1], data=rounded.tobytes())
    check_soft(made, hidden or made.hidden)
    return made


def vectors_of(soft: SoftPrompt) -> FloatArray:
    """The vectors (n, hidden), float64. Raises `ConfigError` if the bytes are not of that shape."""
    if soft.n < 1 or soft.hidden < 1 or len(soft.data) != 4 * soft.n * soft.hidden:
        raise ConfigError(
            f"a soft prompt of shape ({soft.n}, {soft.hidden}) has {4 * max(soft.n * soft.hidden, 0)} bytes; "
            f"got {len(soft.data)}"
        )
    return np.frombuffer(soft.data, dtype="<f4").reshape(soft.n, soft.hidden).astype(np.float64)


def check_soft(soft: SoftPrompt, hidden: int) -> FloatArray:
    """The vectors of a soft prompt that may be sent to a model of width ``hidden``. Raises `ConfigError`."""
    vectors = vectors_of(soft)
    if soft.hidden != hidden:
        raise ConfigError(
            f"the soft prompt has vectors of {soft.hidden} numbers, the model of {hidden}: a soft prompt belongs to "
            "the model that it was tuned on"
        )
    if soft.n > MAX_VECTORS:
        raise ConfigError(f"a soft prompt has at most {MAX_VECTORS} vectors; got {soft.n}")
    if not np.isfinite(vectors).all():
        raise ConfigError("the soft prompt holds numbers that are not finite")
    if (largest := float(np.linalg.norm(vectors, axis=1).max())) > MAX_NORM:
        raise ConfigError(f"a vector of the soft prompt has norm {largest:.4g}; at most {MAX_NORM:g} is sent")
    return vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """``vectors = reshape(A z) + p0`` of an intrinsic vector z (dimension,): A (n_vectors * hidden, dimension) and p0
    (n_vectors, hidden) are normal numbers from ``seed``, with standard deviations ``spread`` and ``start``.

    p0 is drawn like the embeddings of tokens. It can't be zero: the model's first norm scales each vector to the same
    length, so that behind a zero vector the smallest step of z would be as large as any other.
    """

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012  (a message carries this)

    seed: int
    dimension: int
    n_vectors: int
    hidden: int
    spread: float
    start: float

    def __post_init__(self) -> None:
        if self.dimension < 2 or self.hidden < 1 or not 1 <= self.n_vectors <= MAX_VECTORS:
            raise ConfigError(
                f"a projection makes 1 to {MAX_VECTORS} vectors of an intrinsic vector of at least 2 numbers; got "
                f"{self.n_vectors} of {self.dimension}"
            )
        for name in ("spread", "start"):  # the numbers that the wire carries, so that it is the same everywhere
            object.__setattr__(self, name, float(np.float32(getattr(self, name))))

    @classmethod
    def into(
        cls, space: SoftSpace, *, seed: int, dimension: int, n_vectors: int, scale: float, sigma: float
    ) -> Projection:
        """The projection under which z ~ N(0, sigma^2 I) makes vectors whose numbers have ``scale`` times the standard
        deviation of those of token embeddings: spread = scale * std / (sqrt(dimension) * sigma)."""
        return cls(
            seed=seed,
            dimension=dimension,
            n_vectors=n_vectors,
            hidden=space.hidden,
            spread=scale * space.std / (np.sqrt(dimension) * sigma),
            start=space.std,
        )

    def vectors(self, z: FloatArray) -> FloatArray:
        """The vectors (n_vectors, hidden) of one intrinsic vector (dimension,)."""
        a, p0 = _drawn(self.seed, self.dimension, self.n_vectors, self.hidden)
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large is refused where the prompt is made
            moved = (a @ z.astype(np.float32)).reshape(p0.shape)
            return np.asarray(self.spread * moved + self.start * p0, dtype=np.float64)

    def soft(self, z: FloatArray) -> SoftPrompt:
        """The soft prompt of one intrinsic vector. Raises `ConfigError` for one that may not be sent."""
        return soft_prompt(self.vectors(z), self.hidden)


@lru_cache(maxsize=2)
def _drawn(seed: int, dimension: int, n_vectors: int, hidden: int) -> tuple[npt.NDArray[np.float32], ...]:
    """A and p0 of unit variance; 58 MB for 50 vectors of 576 numbers from 500."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, dimension, n_vectors, hidden]))
    p0 = rng.standard_normal((n_vectors, hidden), dtype=np.float32)
    return rng.standard_normal((n_vectors * hidden, dimension), dtype=np.float32), p0
