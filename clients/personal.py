"""Which prompts a client uses for itself: the tuned set, or what is better on its own texts.

Beside the tuned set (``global``) there are, all from prompts that the client has scores of, so without an FM call:

- ``cluster``: the set that is best for the clients that score prompts as this one does
  (`promptfed.federation.grouping`);
- ``own``: the set that is best on this client's texts;
- ``mixed``: the prompts of the tuned set and of ``own`` together, the heaviest of them if they are more than a set may
  hold. The client's calibration weighs them, as it does those of any set; it starts half way between the two.

An option has to be better than ``global`` by a paired one-sided t-test at 0.05, with Holm's correction over the options
(Scandinavian Journal of Statistics 6, 1979); of those that are, the one with the largest gain is used. No option is
tested on texts that it was chosen by: ``own`` is chosen for each fold on the others, ``cluster`` for each half of the
texts on everybody's other halves, and the calibration that a text is scored under did not see its label. Otherwise the
best of several sets would look better than it is, and many clients would leave the prompts that serve them best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from clients.scores import ScoreStore
from evaluators.compare import holm
from promptfed.messages import Choice, Offer
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import mix
from promptfed.types import FloatArray, IntArray

LEVEL = 0.05
# Fewer texts decide nothing: their folds hold one each.
LEAST_TEXTS = 10
FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a client uses; the weights and the bias of ``prompt`` are where its own calibration starts."""

    choice: Choice
    prompt: PromptSet


def choose(store: ScoreStore, tuned: PromptSet, offer: Offer) -> Chosen:
    """The best of what there is for the client that ``store`` is of."""
    task = offer.score
    rows = store.get(task.prompts, task.stop)[2]
    if len(rows) < LEAST_TEXTS:
        return Chosen(choice="global", prompt=tuned)

    def scored(prompts: PromptSet) -> FloatArray:
        return store.proper_scores(prompts.prompts, task.stop, prompts.pooled, beside=task.prompts)

    sets = _sets(tuned, offer)
    by_set = np.stack([scored(s) for s in sets], axis=1)
    picks, best = cross_picked(by_set), int(by_set.mean(axis=0).argmax())
    most = max(len(s) for s in task.sets)
    together = {int(s): halfway(tuned, sets[s], most) for s in {*picks.tolist(), best}}
    of_both = {s: scored(prompts) for s, prompts in together.items()}
    every = np.arange(len(rows))
    found: dict[Choice, tuple[PromptSet, FloatArray]] = {}
    if offer.alike:
        overall, by_first, by_second = offer.alike
        is_first = store.is_first_half(rows, task.stop)
        found["cluster"] = sets[overall], np.where(is_first, by_set[:, by_second], by_set[:, by_first])
    found["own"] = sets[best], by_set[every, picks]
    found["mixed"] = together[best], np.array([of_both[int(s)][i] for i, s in enumerate(picks)])
    # What comes down to the tuned set is no option, and takes nothing from the others' level.
    options = {name: values for name, (prompts, values) in found.items() if prompts.prompts != tuned.prompts}
    choice = better(scored(tuned), options)
    return Chosen(choice=choice, prompt=found[choice][0] if choice in found else tuned)


def better(tuned: FloatArray, options: Mapping[Choice, FloatArray]) -> Choice:
    """Which option beats ``tuned``, from scores (n,) of the same texts; "global" if none does."""
    gains = {name: values - tuned for name, values in options.items()}
    adjusted = holm([p_value(gain) for gain in gains.values()])
    good = [name for name, p in zip(gains, adjusted, strict=True) if p <= LEVEL]
    return max(good, key=lambda name: float(gains[name].mean()), default="global")


def p_value(gains: FloatArray) -> float:
    """Of the one-sided paired t-test that the mean of ``gains`` (n,) is above 0."""
    mean, error = float(gains.mean()), float(gains.std(ddof=1)) / np.sqrt(len(gains))
    if mean < 1e-9:  # the same but for rounding
        return 1.0
    return float(t.sf(mean / error, len(gains) - 1)) if error > 0 else 0.0


def cross_picked(by_set: FloatArray) -> IntArray:
    """For each text (n,), the set with the best mean score ``by_set`` (n, n_sets) over the texts of the other folds;
    the fold of text i is i mod `FOLDS`, as in `cross_fitted_proba`."""
    fold = np.arange(len(by_set)) % FOLDS
    best = [by_set[fold != f].mean(axis=0).argmax() for f in range(FOLDS)]
    return np.asarray(np.array(best)[fold], dtype=np.int64)


def halfway(a: PromptSet, b: PromptSet, most: int) -> PromptSet:
    """The prompts of both, weighed half as ``a`` and half as ``b``; ``a`` itself if it comes down to its prompts.

    Of more than ``most`` the heaviest are kept, and share the weight of the others.
    """
    weights = dict.fromkeys([*a.prompts, *b.prompts], 0.0)
    for side in (a, b):
        for prompt, weight in zip(side.prompts, side.weights, strict=True):
            weights[prompt] += weight / 2
    kept = sorted(weights, key=lambda prompt: -weights[prompt])[:most]  # of equals, those of ``a``
    if set(kept) == set(a.prompts):
        return a
    scale = sum(weights.values()) / max(sum(weights[p] for p in kept), 1e-9)
    bias = (np.array(a.bias) + np.array(b.bias)) / 2
    return PromptSet(
        labels=a.labels,
        prompts=tuple(kept),
        weights=tuple(scale * weights[p] for p in kept),
        bias=tuple(bias.tolist()),
    )


def _sets(tuned: PromptSet, offer: Offer) -> list[PromptSet]:
    """What is offered, with the calibration that a client's own starts from: the sum of the prompts' label-free ones,
    since no labels were pooled for it. The tuned set is itself."""
    task = offer.score
    biases = np.reshape(task.bias, (len(task.prompts), len(tuned.labels)))
    sets = []
    for s in task.sets:
        start = mix([(task.weights[i], biases[i]) for i in s])
        prompts = tuple(task.prompts[i] for i in s)
        made = PromptSet(labels=tuned.labels, prompts=prompts, weights=start.weights, bias=start.bias)
        sets.append(tuned if set(prompts) == set(tuned.prompts) else made)
    return sets
