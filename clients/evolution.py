"""The client's part of soft-prompt search: CMA-ES on the client's own texts, from where the server is.

FedBPT (Sun et al., ICML 2024, arXiv 2310.01467). Each generation, and the local mean at the end, is judged on texts of
its own: a vector that suits the few texts of one generation gains nothing from them in the next.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from clients.data import client_rng
from promptfed.messages.methods import Evolve, Evolved, packed, unpacked
from promptfed.prompts.calibration import batch_calibration
from promptfed.strategies.evolution import open_cma, root
from promptfed.types import FloatArray, IntArray

if TYPE_CHECKING:
    from clients.client import Client

# What stands for a hidden word: causal models have no mask token.
HIDDEN = "_"
# The loss on hidden words that fitness is divided by is at least this, lest one sure guess make it boundless.
LEAST_LOSS = 0.05


async def evolve(client: Client, task: Evolve) -> Evolved:
    """Search, and say where the local mean came to."""
    d = task.projection.dimension
    mean, whitened = unpacked(task.mean, d), root(task.covariance, task.form, d)
    rng = client_rng(task.seed, client.client_id, 11)
    n = min(task.n_texts, len(client.data.train))
    start = int(rng.integers(len(client.data.train)))

    async def fitness(ys: list[FloatArray], turn: int) -> list[float]:
        rows = (start + n * turn + np.arange(n)) % len(client.data.train)
        texts, labels = [client.data.train.texts[i] for i in rows], client.data.train.labels[rows]
        masked = [hide_words(text, task.mask_rate, rng) for text in texts] if task.mask_rate else []
        prompts = [replace(task.template, soft=task.projection.soft(z)) for z in mean + whitened(np.array(ys))]
        answers = await client.fm.complete([r for p in prompts for r in p.requests([*texts, *masked])])
        out = []
        for i, prompt in enumerate(prompts):
            scores = np.asarray(prompt.label_scores(answers[i * (n + len(masked)) : (i + 1) * (n + len(masked))]).data)
            losses = [
                loss(part, labels, client.scores.log_prior if task.calibrated else None)
                for part in (scores[:n], scores[n:])
                if len(part)
            ]
            out.append(losses[0] / max(losses[1], LEAST_LOSS) if masked else losses[0])
        return out

    search = open_cma(np.zeros(d), task.sigma, task.population, rng, separable=task.form != "full")
    sigmas = []
    for turn in range(task.n_iterations):
        sigmas.append(float(search.sigma))
        ys = search.ask()
        search.tell(ys, await fitness(ys, turn))
    (reached,) = await fitness([search.mean], task.n_iterations)
    return Evolved(n=n, mean=packed(mean + whitened(search.mean[None])[0]), fitness=reached, sigmas=tuple(sigmas))


def loss(scores: FloatArray, labels: IntArray, log_prior: FloatArray | None) -> float:
    """Mean cross-entropy, in nats, of label scores (n, K). With the client's ``log_prior`` (K,) they are put under
    batch calibration first and moved to the client's own label proportions: what calibration mends is no fault of a
    prompt, and on few labels no merit either."""
    own = scores[:, None, :]
    if log_prior is None:
        logp = scores
    else:
        logp = np.log(np.maximum(batch_calibration(own).shifted(log_prior).predict_proba(own), 1e-9))
    return float(-logp[np.arange(len(labels)), labels].mean())


def hide_words(text: str, rate: float, rng: np.random.Generator) -> str:
    """``text`` with a share ``rate`` of its words, rounded, in random places, replaced by `HIDDEN`."""
    words = list(re.finditer(r"\S+", text))
    hidden = set(rng.permutation(len(words))[: round(rate * len(words))].tolist())
    places = iter(range(len(words)))
    return re.sub(r"\S+", lambda word: HIDDEN if next(places) in hidden else word.group(), text)
