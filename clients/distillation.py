"""What a domain model learns beside the client's labelled texts: soft labels of the foundation model and of other
clients' models (Hinton et al., arXiv 1503.02531; among clients, Li & Wang, FedMD, arXiv 1910.03581).

The client's unlabelled texts go to its FM only; what leaves of them is how many there were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

from clients.scores import brier_score
from promptfed.errors import RunError
from promptfed.messages import Distil, Distilled, Lessons, Teach, Votes
from promptfed.prompts.calibration import Calibration, batch_calibration
from promptfed.types import FloatArray

if TYPE_CHECKING:
    from clients.client import Client

# A soft label counts as so much of a text with a label: of 0.03 to 2, best for 8, 32 and 128 labels of sentiment5,
# together with a teacher that is heard only where it is sure (on parts of the train split; docs/transfer.md).
LESSON_WEIGHT = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """Texts with soft targets (n, K); a row sums to what the text counts."""

    texts: tuple[str, ...] = field(repr=False)
    targets: FloatArray

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: Taught) -> Taught:
        return Taught(texts=self.texts + other.texts, targets=np.concatenate([self.targets, other.targets]))


def nothing(n_labels: int) -> Taught:
    return Taught(texts=(), targets=np.zeros((0, n_labels)))


def from_others(lessons: Lessons, n_labels: int, min_confidence: float = 0.0, temperature: float = 1.0) -> Taught:
    """Those that whoever gave them was sure enough of, judged before the temperature; all zeros is no lesson. Raises
    `RunError` where they are of other labels than the client's."""
    if len(lessons.shares) != len(lessons.texts) * n_labels:
        raise RunError(
            f"{len(lessons.shares)} shares for {len(lessons.texts)} texts do not fit this client's {n_labels} labels"
        )
    shares = np.frombuffer(lessons.shares, dtype=np.uint8).reshape(-1, n_labels).astype(float)
    proba = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1.0)
    kept = np.flatnonzero(shares.any(axis=1) & (proba.max(axis=1, initial=0.0) >= min_confidence))
    # Half a step of the shares stands for what was rounded to none.
    flatter = softmax(np.log(np.maximum(proba[kept], 0.5 / 255)) / temperature, axis=1)
    targets = proba[kept] if temperature == 1.0 else flatter
    return Taught(texts=tuple(lessons.texts[i] for i in kept.tolist()), targets=LESSON_WEIGHT * targets)


async def teach(client: Client, task: Teach) -> Votes:
    """What the FM says of public texts under the pooled calibration, which is for balanced labels; zeros where it
    failed."""
    requests = [request for p in task.prompt.prompts for request in p.requests(task.texts)]
    answers = await client.fm.complete(requests)
    n = len(task.texts)
    each = [p.label_scores(answers[i * n : (i + 1) * n]) for i, p in enumerate(task.prompt.prompts)]
    failed = np.any([np.ma.getmaskarray(s).any(axis=1) for s in each], axis=0)
    scores = np.stack([np.asarray(s.data) for s in each], axis=1)
    calibration = task.prompt.pooled if task.prompt.is_calibrated else batch_calibration(scores)
    return Votes.of(np.where(failed[:, None], 0.0, calibration.predict_proba(scores)))


async def lessons_of(client: Client, task: Distil) -> Taught:
    """What the client's domain model is to learn by ``task``, FM calls made."""
    n_labels = len(client.labels)
    taught = nothing(n_labels)
    if task.lessons is not None:
        taught = from_others(task.lessons, n_labels, task.min_confidence, task.temperature)
    texts = client.data.unlabelled[: task.stop]
    if task.prompt is None or not texts:
        return taught
    store = client.unlabelled
    await store.ask(client.fm, task.prompt.prompts, len(texts))
    scores, _, rows = store.get(task.prompt.prompts, len(texts))
    # The client's own calibration, which without labels is the pooled one; where nobody has any, one that needs none.
    teacher = client.arms.calibrate(task.prompt) if task.prompt.is_calibrated else batch_calibration(scores)
    kept, targets = soft_labels(scores, teacher, task.temperature, task.min_confidence)
    kept &= ~store.failed(task.prompt.prompts)[rows]
    mine = Taught(texts=tuple(texts[i] for i in rows[kept]), targets=LESSON_WEIGHT * targets[kept])
    return taught + mine


def soft_labels(
    scores: FloatArray, calibration: Calibration, temperature: float, min_confidence: float
) -> tuple[np.ndarray[tuple[int], np.dtype[np.bool_]], FloatArray]:
    """Which texts the teacher is sure enough of (n,), judged before the temperature, and the targets (n, K).

    ``scores`` (n, J, K) of the prompts that ``calibration`` is for.
    """
    logits = calibration.logits(scores)
    sure = softmax(logits, axis=1).max(axis=1) >= min_confidence
    return np.asarray(sure), np.asarray(softmax(logits / temperature, axis=1))


def judged(before: FloatArray, after: FloatArray, labels: np.ndarray, n_lessons: int) -> Distilled:
    """The sums that leave, of two models' probabilities (n, K) of labelled texts that they did not see."""
    old, new = brier_score(before, labels), brier_score(after, labels)
    return Distilled(
        n_lessons=n_lessons,
        n=len(labels),
        before=float(old.sum()),
        after=float(new.sum()),
        diff_sq=float(((new - old) ** 2).sum()),
    )
