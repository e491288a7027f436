"""The answers that a client of a generation task has paid for, and what it tells the server about them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clients.data import Labelled
from clients.scores import Marks, Said, ScoreStore
from evaluators.answers import per_text
from promptfed.errors import RunError
from promptfed.fm.base import BaseFM
from promptfed.messages import Evaluate
from promptfed.prompts.answers import vote
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FloatArray, FMResponse, IntArray


class AnswerStore(ScoreStore):
    """A `ScoreStore` whose label scores have no columns: what it keeps are the prompts' answers to a client's texts.

    What the server is told of a set of prompts is the token F1 of the answer that it votes for.
    """

    def __init__(self, data: Labelled) -> None:
        super().__init__(data, 0)
        self._answers: dict[str, dict[int, str | None]] = {}  # prompt_id -> text -> answer, None where the FM failed

    def _missing(self, prompt: PromptTemplate, stop: int) -> IntArray:
        known = self._answers.get(prompt.prompt_id, {})
        return np.array([i for i in range(stop) if i not in known], dtype=np.int64)

    def _enter(self, prompt: PromptTemplate, rows: IntArray, answers: Sequence[FMResponse]) -> None:
        known = self._answers.setdefault(prompt.prompt_id, {})
        known |= zip(rows.tolist(), prompt.answers(answers), strict=True)

    def get(self, prompts: Sequence[PromptTemplate], stop: int | None = None) -> tuple[FloatArray, IntArray, IntArray]:
        """Of the texts [0, stop) that all ``prompts`` were asked about: no scores (n, J, 0), no labels, rows (n,)."""
        known = [self._answers.get(p.prompt_id, {}) for p in prompts]
        rows = [i for i in range(len(self.data))[:stop] if all(i in answers for answers in known)]
        return np.zeros((len(rows), len(prompts), 0)), self.data.labels, np.array(rows, dtype=np.int64)

    def voted(self, prompts: Sequence[PromptTemplate], weights: Sequence[float], rows: IntArray) -> list[str | None]:
        """The answer of ``prompts`` together to each text of ``rows``, which all of them were asked about."""
        known = [self._answers.get(p.prompt_id, {}) for p in prompts]
        return [vote([answers[i] for answers in known], weights) for i in rows.tolist()]

    def said(self, prompt: PromptTemplate) -> tuple[Said, IntArray]:
        rows = self.get([prompt])[2]
        return np.array(self.voted([prompt], (1.0,), rows), dtype=object), rows

    def _read(self, prompt: PromptTemplate, answers: Sequence[FMResponse]) -> Said:
        return np.array(prompt.answers(answers), dtype=object)

    def mark(self, prompt: PromptTemplate, said: Said, rows: IntArray, pooled: Calibration) -> Marks:  # noqa: ARG002
        """By token F1, where less than 1 is wrong; nothing is calibrated."""
        right = [self.data.answers[i] for i in rows]
        f1 = per_text(said.tolist(), right)["token_f1"]
        given = [answer or "(none)" for answer in said]
        return Marks(right=right, given=given, wrong=np.asarray(f1 < 1.0), score=float(f1.mean()))

    def proper_scores(
        self,
        prompts: Sequence[PromptTemplate],
        stop: int,
        pooled: Calibration,
        beside: Sequence[PromptTemplate] = (),
        half: int | None = None,
    ) -> FloatArray:
        """Token F1 of each text, in [0, 1], higher is better, of the answer that ``prompts`` vote for with the weights
        of ``pooled``; ``beside`` and ``half`` as in `ScoreStore.proper_scores`."""
        rows = self.get([*prompts, *beside], stop)[2]
        if half is not None:
            rows = rows[self.is_first_half(rows, stop) == (half == 0)]
        references = [self.data.answers[i] for i in rows]
        return per_text(self.voted(prompts, pooled.weights, rows), references)["token_f1"]

    async def measure(self, task: Evaluate, fm: BaseFM) -> tuple[dict[str, FloatArray], float]:
        """Every metric of each text (n,) under ``task``'s prompts, and the FM calls that one prediction takes."""
        if task.prompt is None:
            raise RunError(f"arm {task.arm!r} needs a prompt")
        await self.ask(fm, task.prompt.prompts, len(self.data))
        answers = self.voted(task.prompt.prompts, task.prompt.weights, np.arange(len(self.data)))
        return per_text(answers, self.data.answers), float(len(task.prompt.prompts))

    def adopt(self, other: ScoreStore, rows: IntArray) -> None:
        """Take over what ``other`` knows of the same texts: its text ``rows[i]`` is text i here."""
        if isinstance(other, AnswerStore):
            self._answers = {
                prompt_id: {i: known[row] for i, row in enumerate(rows.tolist()) if row in known}
                for prompt_id, known in other._answers.items()
            }
