"""What domain models learn from one another: averages of their parameters within a kind, and votes on public texts,
which models of all kinds understand.

- ``fedavg``: the mean of the clients' parameters, weighted by their texts (McMahan et al., AISTATS 2017, algorithm 1).
- ``fedprox``: the same, each client's loss held to where it started (Li et al., MLSys 2020, equation 2).
- ``fedadam``: the mean change is a gradient for Adam at the server (Reddi et al., ICLR 2021, algorithm 2).
- `ensemble`: the mean vote on public texts, from which each client's own kind learns (FedMD, Li & Wang 2019).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from promptfed.errors import ConfigError, RunError
from promptfed.messages import Lessons, Train, Trained, Vote, Votes
from promptfed.strategies.base import Round, Steps
from promptfed.strategies.exchanges import mean_vote, picked
from promptfed.types import FloatArray

Rule = Literal["fedavg", "fedprox", "fedadam"]
N_ROUNDS = 10
# FedProx's mu; FedAdam's step, decays and adaptivity (the paper's names: eta, beta1, beta2, tau).
PROXIMAL = 0.1
STEP, BETA1, BETA2, ADAPTIVITY = 0.1, 0.9, 0.99, 1e-2
# Public texts that the domain models are asked about.
MAX_PUBLIC = 500


def averaged(kinds: Mapping[str, str], rule: Rule) -> Steps[dict[str, tuple[float, ...]]]:
    """The averaged parameters of each client's kind, by client; of a client whose kind has none, none. ``kinds`` maps
    clients to the kind of their domain model.

    Raises `RunError` where no client has parameters.
    """
    now: dict[str, FloatArray] = {}
    moments: dict[str, tuple[FloatArray, FloatArray]] = {}
    for _ in range(N_ROUNDS):
        tasks = {
            c: Train(parameters=tuple(now.get(kind, ())), proximal=PROXIMAL if rule == "fedprox" else 0.0)
            for c, kind in kinds.items()
        }
        replies = picked((yield Round(name=rule, tasks=tasks)), Trained, lambda b: b.n > 0 and len(b.parameters) > 0)
        for kind in sorted(set(kinds.values())):
            parts = [body for c, body in replies.items() if kinds[c] == kind]
            size = len(now[kind]) if kind in now else _usual_size(parts)
            parts = [p for p in parts if len(p.parameters) == size]
            if not parts:
                continue
            mean = np.average([p.parameters for p in parts], axis=0, weights=[p.n for p in parts])
            if rule != "fedadam" or kind not in now:  # where all start, the server learns in the first round
                now[kind] = mean
                continue
            m, v = moments.get(kind, (np.zeros(size), np.full(size, ADAPTIVITY**2)))
            change = mean - now[kind]
            m, v = BETA1 * m + (1 - BETA1) * change, BETA2 * v + (1 - BETA2) * change**2
            moments[kind] = m, v
            now[kind] = now[kind] + STEP * m / (np.sqrt(v) + ADAPTIVITY)
    if not now:
        told = ", ".join(sorted(set(kinds.values()))) or "none"
        raise RunError(f"no client returned parameters of its domain model to average (kinds: {told})")
    return {c: tuple(now.get(kind, np.zeros(0)).tolist()) for c, kind in kinds.items()}


def _usual_size(parts: Sequence[Trained]) -> int:
    """The number of parameters that most texts stand behind; of several, the larger."""
    behind: Counter[int] = Counter()
    for part in parts:
        behind[len(part.parameters)] += part.n
    return max(behind, key=lambda size: (behind[size], size), default=0)


def ensemble(clients: Sequence[str], n_labels: int, public: Sequence[str]) -> Steps[Lessons]:
    """The mean vote of all domain models on public texts. Raises `ConfigError` without public texts."""
    if not public:
        raise ConfigError("dm_ensemble needs public texts for the domain models to vote on: give data.public")
    texts = tuple(public[:MAX_PUBLIC])
    replies = yield Round(name="vote", tasks=dict.fromkeys(clients, Vote(texts=texts)))
    return Lessons(texts=texts, shares=Votes.of(mean_vote(replies, len(texts), n_labels)).shares)
