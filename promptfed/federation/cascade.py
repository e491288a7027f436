"""How sure a cheap stage of a cascade has to be for its answers to be wrong no more often than a target says.

Selective classification with a guarantee: of the thresholds tried, the most lenient one under which the upper
confidence bound of the error (Clopper & Pearson, Biometrika 1934) is below the target, all of them bounded at once
(Bonferroni), as in Geifman & El-Yaniv (NeurIPS 2017, section 3) with a grid in place of their binary search. The bound
holds for texts like the clients' labelled ones, all clients together: for a single client it may not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import beta

from promptfed.errors import RunError
from promptfed.messages import STAGES, Ask, Cascade, Evaluated, Risk, RiskCounts
from promptfed.strategies.base import Federation, Reading, Round, Steps
from promptfed.strategies.exchanges import picked

# What is tried: equal steps of the log-odds from 0.62 to 0.99. Not many: all are bounded at once.
TRIED: tuple[float, ...] = tuple(np.round(1 / (1 + np.exp(-np.linspace(0.5, 4.6, 12))), 4).tolist())
# Above any probability: a stage that never answers.
NEVER = 2.0
N_EARLY = 2
CONFIDENCE = 0.9


def fit_cascade(
    federation: Federation, reading: Reading, stack: tuple[float, float], target: float, max_fm_calls: int = 0
) -> Steps[dict[str, Cascade]]:
    """What each client's cascade is, by client. ``target``: the share of a stage's answers that may be wrong.
    ``max_fm_calls`` go into more labelled texts for the best prompt: the more there are, the tighter the bound."""
    singles = {c: reading.of(c).single for c in federation.clients}
    left = {c: max(n - reading.of(c).stop, 0) for c, n in federation.clients.items()}
    scale = min(1.0, max_fm_calls / max(sum(left.values()), 1))
    more = {c: int(scale * n) for c, n in left.items() if int(scale * n)}
    if more:
        asked = {c: Ask(prompts=singles[c].prompts, stop=reading.of(c).stop + n) for c, n in more.items()}
        yield Round(name="ask", tasks=asked, grants=more)
    thresholds: tuple[float, ...] = ()
    for _ in range(N_EARLY):
        tasks = {c: Risk(single=s, stack=stack, thresholds=thresholds, tried=TRIED) for c, s in singles.items()}
        replies = picked(
            (yield Round(name="risk", tasks=tasks)),
            RiskCounts,
            lambda b: len(b.answered) == len(b.wrong) == len(TRIED),
        )
        if not replies:
            raise RunError("no client said how often its domain model is wrong; a cascade needs at least one")
        answered, wrong = (np.sum([getattr(b, k) for b in replies.values()], axis=0) for k in ("answered", "wrong"))
        thresholds = (*thresholds, threshold_for(answered.tolist(), wrong.tolist(), target))
    return {c: Cascade(single=s, thresholds=thresholds, target=target) for c, s in singles.items()}


def realised(measured: Mapping[str, Evaluated], target: float | None) -> dict[str, Any]:
    """Of the held-out texts of all clients: which share each stage answered, and which share of these answers was
    wrong (None where a stage, or no stage before the last, answered any); nothing where no client measured a
    cascade."""
    of = [e for e in measured.values() if e.answered]
    if not of:
        return {}
    answered, wrong = (np.sum([getattr(e, k) for e in of], axis=0) for k in ("answered", "wrong"))
    return {
        "target_risk": target,
        "share_by_stage": dict(zip(STAGES, (answered / answered.sum()).round(4).tolist(), strict=True)),
        "wrong_by_stage": {s: _share(w, n) for s, w, n in zip(STAGES, wrong, answered, strict=True)},
        "realised_risk": _share(wrong[:-1].sum(), answered[:-1].sum()),
    }


def _share(part: int, whole: int) -> float | None:
    return round(float(part / whole), 4) if whole else None


def threshold_for(answered: list[int], wrong: list[int], target: float, confidence: float = CONFIDENCE) -> float:
    """The most lenient of `TRIED` that keeps the target with ``confidence``; `NEVER` where none does. ``answered`` and
    ``wrong``: counts at each of them."""
    level = (1 - confidence) / len(TRIED)
    for threshold, n, n_wrong in zip(TRIED, answered, wrong, strict=True):
        if n and upper_bound(n, n_wrong, level) <= target:
            return threshold
    return NEVER


def least_texts(target: float, confidence: float = CONFIDENCE) -> int:
    """How many texts it takes, none answered wrongly, for the bound to be at the target."""
    return math.ceil(math.log((1 - confidence) / len(TRIED)) / math.log1p(-target))


def upper_bound(n: int, n_wrong: int, level: float) -> float:
    """The Clopper-Pearson bound that the true share exceeds with probability ``level`` at most."""
    return 1.0 if n_wrong >= n else float(beta.ppf(1 - level, n_wrong + 1, n - n_wrong))
