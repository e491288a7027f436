"""The label scores that a client has paid for, and what it tells the server about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clients.data import Labelled
from promptfed.fm.base import BaseFM
from promptfed.prompts.calibration import Calibration, cross_fitted_proba, log_prior
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FloatArray, FMResponse, IntArray

# What a prompt said to n texts: label scores (n, K), or the answers that it wrote (n,), None where the FM failed.
Said = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What a prompt said to n texts, marked: the ``right`` answers and those ``given``, in words; whether each is
    ``wrong`` (n,); and the mean ``score``, in [0, 1], higher is better."""

    right: list[str]
    given: list[str]
    wrong: npt.NDArray[np.bool_]
    score: float


class ScoreStore:
    """Log-probabilities of prompts' label words on a client's texts, kept so that nothing is paid for twice.

    An item that the FM refused keeps its place: it is uniform where a number is needed and its score is 0.
    """

    def __init__(self, data: Labelled, n_labels: int) -> None:
        self.data = data
        self.log_prior = log_prior(data.labels, n_labels)
        self._words: dict[str, FloatArray] = {}  # prompt_id -> (n, n_words), nan where not asked
        self._merged: dict[str, dict[tuple[float, ...], FloatArray]] = {}  # prompt_id -> readout -> (n, K)
        self._failed: dict[str, IntArray] = {}  # prompt_id -> 0 or 1 a text

    async def ask(self, fm: BaseFM, prompts: Sequence[PromptTemplate], stop: int) -> int:
        """Score ``prompts`` on texts [0, stop) where they are not scored yet. Returns the number of FM calls."""
        stop = min(stop, len(self.data))
        wanted = [(prompt, self._missing(prompt, stop)) for prompt in {p.prompt_id: p for p in prompts}.values()]
        requests = [r for p, rows in wanted for r in p.requests([self.data.texts[i] for i in rows])]
        if not requests:
            return 0
        answers = await fm.complete(requests)
        start = 0
        for prompt, rows in wanted:
            self._enter(prompt, rows, answers[start : start + len(rows)])
            start += len(rows)
        return len(requests)

    def _missing(self, prompt: PromptTemplate, stop: int) -> IntArray:
        """Of the texts [0, stop), those that ``prompt`` was not asked about."""
        return np.flatnonzero(np.isnan(self._known(prompt)[:stop, 0]))

    def _known(self, prompt: PromptTemplate) -> FloatArray:
        """All word scores of one prompt, (n, n_words); nan where it was not asked about."""
        if prompt.prompt_id not in self._words:
            self._words[prompt.prompt_id] = np.full((len(self.data), len(prompt.word_labels)), np.nan)
            self._failed[prompt.prompt_id] = np.zeros(len(self.data), dtype=np.int64)
        return self._words[prompt.prompt_id]

    def _enter(self, prompt: PromptTemplate, rows: IntArray, answers: Sequence[FMResponse]) -> None:
        scores = prompt.word_scores(answers)
        self._words[prompt.prompt_id][rows] = scores.data
        self._failed[prompt.prompt_id][rows] = np.ma.getmaskarray(scores).any(axis=1)
        self._merged.pop(prompt.prompt_id, None)

    def _label_scores(self, prompt: PromptTemplate) -> FloatArray:
        by_readout = self._merged.setdefault(prompt.prompt_id, {})
        if prompt.readout not in by_readout:
            by_readout[prompt.readout] = prompt.merged(self._known(prompt))
        return by_readout[prompt.readout]

    def words(self, prompt: PromptTemplate, stop: int | None = None) -> tuple[FloatArray, IntArray]:
        """Of the texts [0, stop) that ``prompt`` was scored on: its words as sources (n, n_words, K), labels (n,)."""
        known = self._known(prompt)[:stop]
        rows = np.flatnonzero(np.isfinite(known).all(axis=1))
        return prompt.word_sources(known[rows]), self.data.labels[rows]

    def get(self, prompts: Sequence[PromptTemplate], stop: int | None = None) -> tuple[FloatArray, IntArray, IntArray]:
        """Of the texts [0, stop) that all ``prompts`` were scored on: scores (n, J, K), labels (n,), rows (n,)."""
        scores = np.stack([self._label_scores(p) for p in prompts], axis=1)[:stop]
        rows = np.flatnonzero(np.isfinite(scores).all(axis=(1, 2)))
        return scores[rows], self.data.labels[rows], rows

    def said(self, prompt: PromptTemplate) -> tuple[Said, IntArray]:
        """What ``prompt`` said to the texts that it was asked about, and which texts these are (n,)."""
        scores, _, rows = self.get([prompt])
        return scores[:, 0], rows

    async def hear(self, fm: BaseFM, prompt: PromptTemplate, rows: IntArray) -> Said:
        """Ask ``fm`` what ``prompt`` says to the texts ``rows``. It is not kept: see `clients.tasks`."""
        return self._read(prompt, await fm.complete(prompt.requests([self.data.texts[i] for i in rows])))

    def _read(self, prompt: PromptTemplate, answers: Sequence[FMResponse]) -> Said:
        """Uniform where the FM failed."""
        return np.asarray(prompt.label_scores(answers).data)

    def mark(self, prompt: PromptTemplate, said: Said, rows: IntArray, pooled: Calibration) -> Marks:
        """Mark what ``prompt`` said to the texts ``rows``, by 1 - Brier/2 under ``pooled``, which is for balanced
        labels, shifted to the client's own proportions."""
        proba, labels = pooled.shifted(self.log_prior).predict_proba(said[:, None, :]), self.data.labels[rows]
        given = proba.argmax(axis=1)
        return Marks(
            right=[prompt.words[k] for k in labels],
            given=[prompt.words[k] for k in given],
            wrong=np.asarray(given != labels),
            score=float(brier_score(proba, labels).mean()),
        )

    def proper_scores(
        self,
        prompts: Sequence[PromptTemplate],
        stop: int,
        pooled: Calibration,
        beside: Sequence[PromptTemplate] = (),
        half: int | None = None,
    ) -> FloatArray:
        """1 - Brier/2 of each text, in [0, 1], higher is better, under calibration cross-fitted from ``pooled``,
        which is for balanced labels, shifted to the client's own proportions.

        Only texts that the prompts ``beside`` were scored on too: a client that missed a round may lack some. ``half``:
        only those of the first (0) or of the second (1) half.
        """
        scores, labels, rows = self.get(prompts, stop)
        kept = np.isin(rows, self.get(beside, stop)[2]) if beside else np.ones(len(rows), dtype=bool)
        if half is not None:
            kept &= self.is_first_half(rows, stop) == (half == 0)
        scores, labels, rows = scores[kept], labels[kept], rows[kept]
        if not len(rows):
            return np.zeros(0)
        start = pooled.shifted(self.log_prior)
        value = brier_score(cross_fitted_proba(scores, labels, towards=start), labels)
        failed = np.max([self._failed[p.prompt_id][rows] for p in prompts], axis=0)
        return np.where(failed > 0, 0.0, value)

    def is_first_half(self, rows: IntArray, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the texts ``rows`` (n,) are in the first half of [0, stop)."""
        return np.asarray(2 * rows < min(stop, len(self.data)))

    def failed(self, prompts: Sequence[PromptTemplate]) -> npt.NDArray[np.bool_]:
        """Of all texts (n,), those that the FM failed on with one of ``prompts``."""
        return np.asarray(np.max([self._failed[p.prompt_id] for p in prompts], axis=0) > 0)

    def adopt(self, other: ScoreStore, rows: IntArray) -> None:
        """Take over what ``other`` knows of the same texts: its text ``rows[i]`` is text i here."""
        self._merged.clear()
        for prompt_id, scores in other._words.items():
            self._words[prompt_id] = scores[rows]
            self._failed[prompt_id] = other._failed[prompt_id][rows]


def brier_score(proba: FloatArray, labels: IntArray) -> FloatArray:
    """1 - Brier/2 of each text: 1 for a sure right answer, 0 for a sure wrong one. ``proba`` (n, K)."""
    return np.asarray(1.0 - ((proba - np.eye(proba.shape[1])[labels]) ** 2).sum(axis=1) / 2.0)
