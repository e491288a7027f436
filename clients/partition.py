"""Partitioners: split one labelled data set among simulated clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clients.data import Rows
from promptfed.errors import DataError


def dirichlet(rows: Sequence[Rows], n_clients: int, alpha: float, seed: int) -> list[Rows]:
    """Label skew (Hsu et al., 2019, arXiv 1909.06335): client shares of each label are drawn from Dirichlet(alpha).

    ``rows`` are splits (train, test, ...); every split uses the same shares, so a client is tested on its own label
    mix. Each client gets at least one row of the first split; with fewer rows than clients that is a `DataError`.
    Small ``alpha`` is a strong skew.
    """
    if len(rows[0]) < n_clients:
        raise DataError(f"{len(rows[0])} training rows can't be dealt to {n_clients} clients; each needs one at least")
    rng = np.random.default_rng(np.random.SeedSequence([seed, 11]))
    labels = sorted({label for split in rows for _, _, label in split})
    shares = {label: rng.dirichlet(np.full(n_clients, alpha)) for label in labels}
    width = len(str(n_clients - 1))
    out: list[Rows] = []
    for number, split in enumerate(rows):
        dealt: list[list[tuple[str, str]]] = [[] for _ in range(n_clients)]
        for label in labels:
            mine = [(text, y) for _, text, y in split if y == label]
            order = rng.permutation(len(mine))
            cuts = np.rint(np.cumsum(shares[label])[:-1] * len(mine)).astype(int)
            for client, part in enumerate(np.split(order, cuts)):
                dealt[client] += [mine[i] for i in part]
        if number == 0:
            for poor in (d for d in dealt if not d):
                poor.append(max(dealt, key=len).pop())
        out.append([(f"client{c:0{width}d}", text, y) for c, part in enumerate(dealt) for text, y in part])
    return out
