"""BM25 over the passages of an index (Robertson & Zaragoza, 2009), by bm25s."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np

from promptfed.types import FloatArray, IntArray

# Vowels and tones that stand above, below or beside a letter are of its word; \w has the letters only.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x1_2000)) if unicodedata.category(c) in ("Mn", "Mc"))
_TOKEN = re.compile(rf"\w[\w{_MARKS}]*")
# Runs of scripts that put no space between words: Thai to Lao, Myanmar, Khmer, Japanese, Chinese.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


class LexicalIndex:
    """BM25 with k1 = 1.5 and b = 0.75, over words, whatever their case and Unicode form; scripts that put no space
    between words are read by pairs of characters. Built once; a changed index builds another."""

    def __init__(self, texts: Sequence[str], ids: IntArray) -> None:
        self._ids = ids
        words = [_words(text) for text in texts]
        self._known = {word for text in words for word in text}
        self._bm25: Any = None
        if self._known:
            self._bm25 = bm25s.BM25()
            self._bm25.index(words, show_progress=False)

    def search(self, query: str, k: int) -> tuple[FloatArray, IntArray]:
        """Scores above 0 and ids, the best first, at most ``k``; of equal ones, the smaller id first."""
        words = [word for word in _words(query) if word in self._known]
        if not words:
            return np.zeros(0), np.zeros(0, dtype=np.int64)
        scores = np.asarray(self._bm25.get_scores(words), dtype=np.float64)
        best = np.lexsort((self._ids, -scores))[:k]
        best = best[scores[best] > 0]
        return scores[best], self._ids[best]


def _words(text: str) -> list[str]:
    out: list[str] = []
    for word in _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()):
        out += filter(None, _SPACELESS.split(word))
        for run in _SPACELESS.findall(word):
            out += [run[i : i + 2] for i in range(max(len(run) - 1, 1))]
    return out
