"""What an asker and the owner of an index say to each other.

A search has two steps: owners answer it with scores and numbers of passages, and show the text of those alone that were
among the best of all owners. So what is found nowhere near the top is not shown to anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from promptfed.errors import WireError
from promptfed.ledger import Count
from promptfed.messages.core import Message
from promptfed.types import FloatArray, IntArray, QueryForm, SearchMode

# The most passages of a query that an owner is asked for.
MAX_HITS = 10_000
# What an owner lets an asker see of a passage. Each has those before it.
Share = Literal["nothing", "scores", "snippets", "documents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Describe(Message):
    """Say what your index is like, as far as ``asker`` may know."""

    asker: str
    kind: Literal["describe"] = "describe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Described(Message):
    """``centroid``: the sum of the documents' vectors, each clipped to length ``clip``, with Gaussian noise of
    ``noise_multiplier`` times ``clip`` (float32, `packed`); empty where the owner gives none. It is (``epsilon``,
    ``delta``)-differentially private, neighbours being indices of which one has a document more; ``epsilon`` 0 says
    that no noise was added. ``accepts``: whether it takes queries as texts, as vectors, or both.
    """

    encoder: str
    shares: Share
    accepts: tuple[QueryForm, ...]
    centroid: bytes = b""
    clip: float = 0.0
    noise_multiplier: float = 0.0
    epsilon: float = 0.0
    delta: float = 0.0
    kind: Literal["described"] = "described"


@dataclass(frozen=True, slots=True, kw_only=True)
class Search(Message):
    """Find the ``k`` best passages for each query: ``texts``, or ``vectors`` of ``dimension`` numbers by ``encoder``
    (float32, `packed`), one of the two."""

    asker: str
    k: Annotated[int, Field(ge=1, le=MAX_HITS)]
    mode: SearchMode = "dense"
    texts: tuple[str, ...] = ()
    vectors: bytes = b""
    dimension: Count = 0
    encoder: str = ""
    kind: Literal["search"] = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Message):
    """Scores (float32) and numbers of passages (int64) for ``n`` queries, (n, k) each, the best first; number -1 where
    there are fewer. A number is drawn for this search; it is good for a `Fetch` by the same asker soon after."""

    n: Count
    scores: bytes
    passages: bytes
    kind: Literal["found"] = "found"

    @classmethod
    def of(cls, scores: FloatArray | np.ndarray[tuple[int, int], np.dtype[np.float32]], passages: IntArray) -> Found:
        return cls(n=len(scores), scores=scores.astype("<f4").tobytes(), passages=passages.astype("<i8").tobytes())

    def __post_init__(self) -> None:
        n_scores, rest = divmod(len(self.scores), 4)
        if rest or len(self.passages) != 8 * n_scores or n_scores % max(self.n, 1):
            raise WireError(f"{len(self.scores)} bytes of scores, {len(self.passages)} of passages, {self.n} queries")
        scores = np.frombuffer(self.scores, dtype="<f4")
        if np.isnan(scores).any() or np.isposinf(scores).any():
            raise WireError("a score is not a number, or is infinite")

    @property
    def arrays(self) -> tuple[FloatArray, IntArray]:
        """Scores and numbers, (n, k)."""
        shape = (self.n, len(self.scores) // (4 * max(self.n, 1)))
        scores = np.frombuffer(self.scores, dtype="<f4").astype(np.float64)
        return scores.reshape(shape), np.frombuffer(self.passages, dtype="<i8").astype(np.int64).reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch(Message):
    """Show these passages, which you found for ``asker``."""

    asker: str
    passages: tuple[Count, ...]
    kind: Literal["fetch"] = "fetch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown(Message):
    """Document, place in it and text of each passage, as far as the asker may see it; empty where it is gone, or was
    not found for this asker."""

    doc_ids: tuple[str, ...]
    places: tuple[Count, ...]
    texts: tuple[str, ...]
    kind: Literal["shown"] = "shown"

    def __post_init__(self) -> None:
        if not len(self.doc_ids) == len(self.places) == len(self.texts):
            raise WireError(f"{len(self.doc_ids)} documents, {len(self.places)} places, {len(self.texts)} texts")

    @property
    def n(self) -> int:
        return len(self.texts)


TaskBody = Describe | Search | Fetch
ReplyBody = Described | Found | Shown
