"""A client's part in tuning slots of n-grams: counts for the vocabulary, and steps of policy gradient on its own texts.

BDPL (Diao et al., TMLR 2023, arXiv 2201.08531, equations 5 to 7), of which FedOne (Wang et al., ICML 2025) is the
federated form. What differs from the paper is told in `promptfed.strategies.fedone_bdpl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp

from clients.data import client_rng
from promptfed.errors import WireError
from promptfed.messages.methods import CountNgrams, NgramCounts, Policy, PolicyStep, packed, unpacked
from promptfed.prompts.calibration import centre
from promptfed.prompts.ngrams import LEAST_TEXTS, MAX_NGRAMS, MAX_WORDS, joined, ngrams_of
from promptfed.prompts.slots import draw, floored, policy_gradient
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FloatArray, FMResponse, IntArray

if TYPE_CHECKING:
    from clients.client import Client

BoolArray = npt.NDArray[np.bool_]


async def count_ngrams(client: Client, task: CountNgrams) -> NgramCounts:
    """In how many of the client's texts each n-gram stands; 0 for less than `LEAST_TEXTS`. No FM call.

    Raises `WireError` for more of them, or longer ones, than the method asks about: with n-grams of its choice a server
    could follow a text from word to word.
    """
    wanted, texts = set(task.ngrams), client.data.train.texts
    if len(wanted) > MAX_NGRAMS or any(len(ngram.split()) > MAX_WORDS for ngram in wanted):
        raise WireError(f"asked to count {len(wanted)} n-grams: expected {MAX_NGRAMS} of {MAX_WORDS} words at most")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(wanted & ngrams_of(text, MAX_WORDS))
    shown = tuple(counts[ngram] if counts[ngram] >= LEAST_TEXTS else 0 for ngram in task.ngrams)
    return NgramCounts(n=len(texts), counts=shown)


async def policy_step(client: Client, task: PolicyStep) -> Policy:
    """``n_steps`` steps from the task's logits. At most n_samples x n_texts FM calls a step: the same prompt drawn
    twice is asked once."""
    data, rng = client.data.train, client_rng(task.seed, client.client_id, 11)
    logits = unpacked(task.logits, task.n_slots, len(task.vocabulary))
    temperature = task.temperature if task.estimator == "gumbel" else None
    losses = []
    for _ in range(task.n_steps):
        drawn, scores = draw(logits, task.n_samples, rng, temperature)
        # A run of the scoring order has about the client's label proportions, so that batches differ less.
        rows = (rng.integers(len(data)) + np.arange(min(task.n_texts, len(data)))) % len(data)
        texts, labels = [data.texts[i] for i in rows], data.labels[rows]
        distinct, which = np.unique(drawn, axis=0, return_inverse=True)
        prompts = [
            replace(task.template, text=joined([task.vocabulary[j] for j in prompt], task.template.text))
            for prompt in distinct
        ]
        answers = await client.fm.complete([request for prompt in prompts for request in prompt.requests(texts)])
        parts = [answers[i : i + len(texts)] for i in range(0, len(answers), len(texts))]
        bounds = [
            loss_bounds(*calibrated_logits(prompt, part, labels, task.weight, client.scores.log_prior), labels)
            for prompt, part in zip(prompts, parts, strict=True)
        ]
        low, high = np.moveaxis(np.array(bounds)[which.ravel()], 1, 0)  # (I, n) each
        losses.append(low.mean())
        step = task.learning_rate * policy_gradient(known_advantages(low, high), scores)
        logits = floored(logits - clipped(step, task.max_step), task.entropy_floor)
    return Policy(n=len(data), logits=packed(logits), loss=float(np.mean(losses)))


def calibrated_logits(
    prompt: PromptTemplate, answers: Sequence[FMResponse], labels: IntArray, weight: float, log_prior: FloatArray
) -> tuple[FloatArray, BoolArray]:
    """Logits (n, K) of one prompt's answers, and which of them are no more than an upper bound.

    The prompt's own label bias is taken off: the mean score of the texts of each label, over the labels that there are,
    becomes 0 (from texts with nothing censored), and ``log_prior`` is added. What is left is how well the prompt tells
    labels apart; with texts of one label, nothing. A label is censored if one of its words is, and a failed answer says
    nothing of any label.
    """
    words = prompt.word_scores(answers)
    unknown = np.ma.getmaskarray(words).copy()
    for row, answer in zip(unknown, answers, strict=True):
        if answer.censored is not None:
            row |= answer.censored
    censored = np.stack([unknown[:, prompt.word_labels == k].any(axis=1) for k in range(len(prompt.words))], axis=1)
    scores = centre(prompt.merged(words.data)[:, None])[:, 0]
    exact = ~censored.any(axis=1)
    if exact.any():
        scores = scores - np.mean([scores[exact & (labels == k)].mean(axis=0) for k in set(labels[exact])], axis=0)
    return weight * scores + log_prior, censored


def loss_bounds(logits: FloatArray, censored: BoolArray, labels: IntArray) -> tuple[FloatArray, FloatArray]:
    """Between which values the cross-entropy of each text lies, (n,) each, from ``logits`` (n, K) of which the
    ``censored`` ones are upper bounds. Both are the loss itself where nothing is censored.

    A censored label may have any probability from 0 to its bound. So the loss is least with all the others at 0, and
    largest with all of them at their bounds and that of the true label, if it is one, at 0: then it is infinite.
    """
    logp = log_softmax(logits, axis=1)
    is_true = np.eye(logits.shape[1], dtype=bool)[labels]
    of_true = logp[is_true]
    low = logsumexp(np.where(censored & ~is_true, -np.inf, logp), axis=1) - of_true
    return np.maximum(low, 0.0), np.where(censored[is_true], np.inf, -of_true)


def known_advantages(low: FloatArray, high: FloatArray) -> FloatArray:
    """How much larger each draw's loss is than the mean of the others (leave-one-out), (I,), from bounds (I, n).

    The mean over the other draws and the texts of the difference of two losses; where that lies in an interval, what
    is certain of it: its value nearest to 0. So a label outside the top-k speaks against its prompt as far as is known,
    and no number is made up for it. Without censoring it is I/(I-1) times the loss less the mean loss of all draws.
    """
    others = max(len(low) - 1, 1)
    more = np.maximum(low[:, None] - high[None], 0.0)  # (I, I, n); never more than `low`, which is finite
    return np.asarray((more - more.transpose(1, 0, 2)).mean(axis=2).sum(axis=1) / others)


def clipped(step: FloatArray, max_norm: float) -> FloatArray:
    """``step``, shortened to ``max_norm`` if it is longer."""
    norm = float(np.linalg.norm(step))
    return step if norm <= max_norm else step * (max_norm / norm)
