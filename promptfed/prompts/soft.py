"""Soft prompts: vectors that stand where the embeddings of a prompt's first tokens would.

They are made, checked and read here; a foundation model takes them with `LabelRequest.soft` and `TextRequest.soft`. A
server that computes on whatever it is sent can crash on a wrong shape or on a number that is not finite, so nothing
that fails a check here is ever sent.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from promptfed.errors import ConfigError
from promptfed.types import FloatArray, SoftPrompt

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
