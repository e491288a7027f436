"""A random policy over prompts: independent categorical slots, each over the same vocabulary.

What BDPL (Diao et al., TMLR 2023, arXiv 2201.08531, section 3) tunes. The published method keeps probabilities on the
simplex and divides by them; here a policy is its logits, of which any finite values are one: the gradient of log P has
no division in it, and no projection is needed.
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax, softmax

from promptfed.types import FloatArray, IntArray

# Share of the uniform distribution that every slot keeps: no probability is ever 0.
LEAST_MIX = 1e-9


def draw(
    logits: FloatArray, n: int, rng: np.random.Generator, temperature: float | None = None
) -> tuple[IntArray, FloatArray]:
    """``n`` prompts, as places in the vocabulary (n, n_slots), and each one's gradient of log P by the ``logits``
    (n_slots, N): (n, n_slots, N).

    Without ``temperature``, P is p = softmax(logits) and the gradient is onehot - p (REINFORCE). With one, each prompt
    has a p of its own, softmax((logits + Gumbel noise) / temperature), and the gradient is (onehot - p) / temperature:
    that of GS-BDPL by log a, which is theirs by a times a, so that nothing is divided by a.
    """
    if temperature is None:
        p, scale = np.broadcast_to(softmax(logits, axis=1), (n, *logits.shape)), 1.0
    else:
        p, scale = softmax((logits + rng.gumbel(size=(n, *logits.shape))) / temperature, axis=2), 1.0 / temperature
    cumulative = np.cumsum(p, axis=2)
    passed = rng.random((n, len(logits), 1)) * cumulative[:, :, -1:] >= cumulative
    drawn = np.minimum(passed.sum(axis=2), logits.shape[1] - 1)
    return drawn, (np.eye(logits.shape[1])[drawn] - p) * scale


def policy_gradient(advantages: FloatArray, scores: FloatArray) -> FloatArray:
    """Estimate of the gradient of the expected loss (n_slots, N): the mean of ``advantages`` (n,) times ``scores``
    (n, n_slots, N), the gradients of log P. Unbiased if each advantage is a loss less a baseline of other draws."""
    return np.asarray(np.einsum("k,ksv->sv", advantages, scores) / len(advantages))


def entropy(p: FloatArray) -> FloatArray:
    """Of each row of probabilities, in nats."""
    return np.asarray(-np.sum(p * np.log(np.maximum(p, np.finfo(float).tiny)), axis=1))


def floored(logits: FloatArray, share: float) -> FloatArray:
    """The policy as log-probabilities, each slot mixed with the uniform distribution by as little as it takes for its
    entropy to be ``share`` (in [0, 1)) of the largest, log N. A slot's best n-gram stays its best."""
    p, size = softmax(logits, axis=1), logits.shape[1]
    low, high = np.zeros((len(p), 1)), np.ones((len(p), 1))
    for _ in range(40):  # the entropy rises all the way to the uniform distribution: it is concave
        middle = (low + high) / 2
        is_short = entropy(p * (1 - middle) + middle / size)[:, None] < share * np.log(size)
        low, high = np.where(is_short, middle, low), np.where(is_short, high, middle)
    mix = np.maximum(high, LEAST_MIX)
    return np.asarray(np.log(p * (1 - mix) + mix / size))


def most_probable(logits: FloatArray, n: int) -> IntArray:
    """The most probable prompt, and the ``n`` - 1 likeliest ones that differ from it in one slot by that slot's next
    best n-gram, likeliest first. Shape (at most n, n_slots)."""
    logp, rows = log_softmax(logits, axis=1), np.arange(len(logits))
    order = np.argsort(-logp, axis=1, kind="stable")
    best = order[:, 0]
    others = []
    if logits.shape[1] > 1:
        given_up = logp[rows, best] - logp[rows, order[:, 1]]
        others = [np.where(rows == slot, order[:, 1], best) for slot in np.argsort(given_up, kind="stable")[: n - 1]]
    return np.stack([best, *others]).astype(np.int64)
