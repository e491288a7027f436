"""Groups of clients that are served by the same prompts, from how each client scored the finalists.

A client's profile is its mean score of every set of finalists, less their mean: which sets it does better with, not
how well it does. Profiles are joined by average linkage; how many groups there are is the number with the largest mean
silhouette (Rousseeuw, J. Comput. Appl. Math. 20, 1987), and one where that is below `STRUCTURE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform

from promptfed.messages import Scored
from promptfed.types import FloatArray, IntArray

# Mean silhouette from which Kaufman and Rousseeuw (Finding Groups in Data, 1990) see a reasonable structure.
STRUCTURE = 0.5


def best_alike(halves: Sequence[Mapping[str, Scored]]) -> dict[str, tuple[int, ...]]:
    """For each client, which set is best for its group: by all texts, by the first halves, by the second.

    ``halves``: what the clients said of the same sets on either half of their texts. Groups are found anew on each
    half, so that what comes of one half can be tested on the other. Empty where all clients are one group.
    """
    clients = sorted(halves[0].keys() & halves[1].keys())
    if len(clients) < 3:
        return {}
    totals = [np.array([half[c].total for c in clients]) for half in halves]
    sizes = [np.array([half[c].n for c in clients]) for half in halves]
    best, n_groups = list[IntArray](), list[int]()
    for total, n in ((sum(totals), sum(sizes)), *zip(totals, sizes, strict=True)):
        group = groups(np.asarray(total / np.asarray(n)[:, None]))
        best.append(np.array([np.asarray(total)[group == g].sum(axis=0).argmax() for g in group]))
        n_groups.append(len(set(group.tolist())))
    if n_groups[0] == 1:
        return {}
    return {c: tuple(int(b[i]) for b in best) for i, c in enumerate(clients)}


def groups(scores: FloatArray) -> IntArray:
    """Group of each client (n,), from the mean scores (n, n_sets) of the same sets at each."""
    n = len(scores)
    one = np.zeros(n, dtype=np.int64)
    if n < 3:
        return one
    distances = pdist(scores - scores.mean(axis=1, keepdims=True))
    tree, square = linkage(distances, method="average"), squareform(distances)
    cuts = [np.asarray(fcluster(tree, k, criterion="maxclust"), dtype=np.int64) - 1 for k in range(2, n)]
    best = max(cuts, key=lambda cut: silhouette(square, cut))
    return best if silhouette(square, best) >= STRUCTURE else one


def silhouette(distances: FloatArray, group: IntArray) -> float:
    """Mean over clients of (b - a) / max(a, b): a is the mean distance to one's own group, b to the nearest other one;
    0 for a client that is alone in its group, and where there is one group only, or a group for each. ``distances``
    (n, n)."""
    from sklearn.metrics import silhouette_score  # takes most of a second, and few runs look for groups

    n_groups = len(np.unique(group))
    return float(silhouette_score(distances, group, metric="precomputed")) if 1 < n_groups < len(group) else 0.0
