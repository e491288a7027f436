"""Documents, and the passages that an index finds them by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

# Words of a passage, and how many of them the next one begins with. all-MiniLM-L6-v2 reads 256 tokens, about 180 words.
PASSAGE_WORDS, OVERLAP_WORDS = 180, 30

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text under an id of its owner's choosing. ``metadata`` is what `msgpack` takes, and stays at the owner."""

    doc_id: str
    text: str = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def digest(self) -> bytes:
        """Of all that it holds: the same document added again is known by it."""
        whole = [self.doc_id, self.text, sorted(self.metadata.items())]
        return hashlib.sha256(msgpack.packb(whole)).digest()


def passages(text: str, n_words: int, n_overlap: int) -> Iterator[str]:
    """``text`` in windows of ``n_words`` words, each beginning ``n_overlap`` words before the end of the last one.
    Nothing for a text without words."""
    words = [match.span() for match in _WORD.finditer(text)]
    start = 0
    while start < len(words):
        stop = min(start + n_words, len(words))
        yield text[words[start][0] : words[stop - 1][1]]
        if stop == len(words):
            return
        start = stop - n_overlap
