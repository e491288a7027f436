"""Answers that a foundation model writes: what counts as the same answer, and which one several prompts agree on."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def first_line(text: str) -> str:
    """The answer in what was written: its first line, stripped."""
    return text.strip().split("\n", 1)[0].strip()


def normalised(answer: str) -> str:
    """As SQuAD compares answers (Rajpurkar et al., EMNLP 2016, arXiv 1606.05250): in lower case, without punctuation
    and articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def vote(answers: Sequence[str | None], weights: Sequence[float]) -> str | None:
    """The answer with the most weight behind it, as who gave it first spelled it; the first one of equals.

    Answers that are the same when `normalised` are one. None has no say, and comes out only where nobody answered.
    """
    spelled: dict[str, str] = {}
    behind: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            key = normalised(answer)
            spelled.setdefault(key, answer)
            behind[key] = behind.get(key, 0.0) + weight
    return spelled[max(behind, key=behind.__getitem__)] if behind else None
