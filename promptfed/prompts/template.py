"""A prompt: raw text with one ``{text}`` slot, and the label words that may follow it.

The slot is replaced once and nothing else is interpreted, so braces in a text are harmless. The verbalizer (``words``,
``synonyms`` and ``separator``) owns the white space before a label word; chat templates are the foundation model
adapter's affair.

A label may be read off several words at once: its score is then the mean of their log-probabilities, or their sum with
weights that were learned (``readout``), as in the knowledgeable verbalizers of Hu et al. (ACL 2022, arXiv 2108.02035).
All words come with one answer, so this costs no FM call.

A prompt without label words is one that generates: the foundation model goes on in its own words, and its first line is
the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import log_softmax

from promptfed.errors import ConfigError
from promptfed.prompts.answers import first_line
from promptfed.types import FloatArray, FMRequest, FMResponse, IntArray, LabelRequest, SoftPrompt, TextRequest

SLOT = "{text}"
# A short answer is at most so many tokens: a date or an order number may take a dozen.
ANSWER_TOKENS = 24


def content_hash(value: object, length: int = 12) -> str:
    """SHA-256 over canonical JSON, ``length`` hex digits."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """``text`` with exactly one slot; ``words[k]`` and, if there are any, ``synonyms[k]`` stand for label k after
    ``separator``. ``readout`` has a weight for each word in the order of `by_label`; without, a label's count alike.
    Without ``words`` the prompt generates. ``soft`` stands before the text, at a model that takes soft prompts."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by pydantic where a message carries this)

    text: str
    words: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()
    separator: str = " "
    readout: tuple[float, ...] = ()
    soft: SoftPrompt | None = None

    def __post_init__(self) -> None:
        if (found := self.text.count(SLOT)) != 1:
            raise ConfigError(f"a prompt needs the slot {SLOT} exactly once; found {found} times")
        if len(self.words) == 1:
            raise ConfigError("a prompt needs at least two label words, or none for one that generates; got 1")
        if self.synonyms and len(self.synonyms) != len(self.words):
            raise ConfigError(f"synonyms are for {len(self.synonyms)} labels, the label words for {len(self.words)}")
        every = [word for words in self.by_label for word in words]
        if len(set(every)) != len(every) or not all(w.strip() for w in every):
            raise ConfigError(f"label words must be distinct and not empty; got {every}")
        if self.readout and len(self.readout) != len(every):
            raise ConfigError(f"readout has {len(self.readout)} weights for {len(every)} label words")
        # The numbers that the wire carries (32 bits), so that it is the same prompt everywhere.
        object.__setattr__(self, "readout", tuple(np.asarray(self.readout, dtype=np.float32).tolist()))

    @property
    def by_label(self) -> tuple[tuple[str, ...], ...]:
        """All words that stand for each label."""
        return tuple(
            (word, *more) for word, more in zip(self.words, self.synonyms or ((),) * len(self.words), strict=True)
        )

    @property
    def prompt_id(self) -> str:
        """Content hash of what the FM is asked: ``readout`` has no part in it."""
        return _prompt_id(self.text, self.by_label, self.separator, self.soft)

    def requests(self, texts: Sequence[str]) -> list[FMRequest]:
        """One request a text: `LabelRequest`s, or greedy `TextRequest`s of one line where there are no label words.

        White space that ends a label request's prefix goes with the text, where tokenizers expect it.
        """
        before, after = self.text.split(SLOT)
        if not self.words:
            return [*self.text_requests(texts)]
        prefix = before.rstrip(" ")
        space = before[len(prefix) :]
        labels = tuple(self.separator + word for words in self.by_label for word in words)
        return [
            LabelRequest(prefix=prefix, text=space + text, suffix=after, labels=labels, soft=self.soft)
            for text in texts
        ]

    def text_requests(self, texts: Sequence[str]) -> list[TextRequest]:
        """`requests` of a prompt that generates."""
        before, after = self.text.split(SLOT)
        return [TextRequest(prompt=before + text + after, max_tokens=ANSWER_TOKENS, soft=self.soft) for text in texts]

    @property
    def word_labels(self) -> IntArray:
        """The label of each word, in the order of `by_label`."""
        return np.repeat(np.arange(len(self.words)), [len(words) for words in self.by_label])

    def answers(self, responses: Sequence[FMResponse]) -> list[str | None]:
        """Of a prompt that generates: the first line of what was written, stripped; None where the FM failed."""
        return [None if response.text is None else first_line(response.text) for response in responses]

    def label_scores(self, answers: Sequence[FMResponse]) -> np.ma.MaskedArray[Any, Any]:
        """Log-probabilities (n, n_labels), normalised over the labels, of what `requests` were answered.

        A failed or non-finite answer masks its row, which is then uniform.
        """
        scores = self.word_scores(answers)
        bad = np.ma.getmaskarray(scores)[:, :1]
        return np.ma.MaskedArray(self.merged(scores.data), mask=np.repeat(bad, len(self.words), axis=1))

    def word_scores(self, answers: Sequence[FMResponse]) -> np.ma.MaskedArray[Any, Any]:
        """Log-probabilities (n, n_words) of all words, in the order of `by_label`; failed rows are 0 and masked."""
        scores = np.full((len(answers), len(self.word_labels)), np.nan)
        for row, answer in zip(scores, answers, strict=True):
            if answer.logprobs is not None:
                row[:] = answer.logprobs
        bad = ~np.isfinite(scores).all(axis=1)
        scores[bad] = 0.0
        return np.ma.MaskedArray(scores, mask=np.repeat(bad[:, None], scores.shape[1], axis=1))

    def merged(self, word_scores: FloatArray) -> FloatArray:
        """Log-probabilities (n, n_labels) from those of all words (n, n_words)."""
        label = self.word_labels
        weights = np.asarray(self.readout) if self.readout else 1.0 / np.bincount(label)[label]
        return np.asarray(log_softmax((word_scores * weights) @ np.eye(len(self.words))[label], axis=1))

    def word_sources(self, word_scores: FloatArray) -> FloatArray:
        """Each word as a source of its own (n, n_words, n_labels), which speaks for its label alone: what weights are
        fitted on (`promptfed.prompts.calibration`, equation 1)."""
        centred = word_scores - word_scores.mean(axis=1, keepdims=True)
        return np.asarray(centred[:, :, None] * np.eye(len(self.words))[self.word_labels])


@lru_cache(maxsize=4096)  # asked for at every turn, of a few hundred prompts
def _prompt_id(text: str, by_label: tuple[tuple[str, ...], ...], separator: str, soft: SoftPrompt | None) -> str:
    beside = () if soft is None else (hashlib.sha256(soft.data).hexdigest(),)
    return content_hash([text, by_label, separator, *beside])
