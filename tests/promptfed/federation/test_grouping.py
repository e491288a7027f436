"""Groups of clients: planted groups, one group where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from promptfed.federation.grouping import best_alike, groups, silhouette
from promptfed.messages import Scored


def scored(means: list[float], n: int = 20) -> Scored:
    total = tuple(n * m for m in means)
    return Scored(n=n, total=total, diff=(0.0,) * len(means), diff_sq=(0.0,) * len(means))


def test_the_silhouette_by_hand_and_none_of_one_group_or_of_a_group_for_each() -> None:
    distances = squareform(pdist(np.array([[0.0], [1.0], [5.0]])))

    # From its own group and from the other one: 1 and 5, 1 and 4; and one that is alone.
    assert silhouette(distances, np.array([0, 0, 1])) == pytest.approx(((5 - 1) / 5 + (4 - 1) / 4 + 0) / 3)
    assert silhouette(distances, np.zeros(3, dtype=int)) == 0.0
    assert silhouette(distances, np.arange(3)) == 0.0


def test_planted_groups_are_found_whatever_each_client_s_level() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0.9, 0.5, 0.5], [0.5, 0.9, 0.5], [0.5, 0.5, 0.9]])
    which = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    level = rng.uniform(-0.1, 0.1, size=(8, 1))

    found = groups(centres[which] + level + rng.normal(0, 0.02, size=(8, 3)))

    assert len(set(zip(found.tolist(), which.tolist(), strict=True))) == 3
    assert len(set(found.tolist())) == 3


def test_clients_that_are_all_alike_are_one_group() -> None:
    assert groups(np.full((6, 4), 0.7)).tolist() == [0] * 6
    assert groups(np.array([[0.9, 0.1], [0.1, 0.9]])).tolist() == [0, 0]  # two clients make no group


def test_the_best_set_of_each_group_by_hand() -> None:
    """Clients a to d do best with set 0, y and z with set 2. On the second half y looks like the others."""
    first = {c: scored([0.8, 0.6, 0.5]) for c in "abcd"} | {c: scored([0.5, 0.6, 0.9]) for c in "yz"}
    second = {**first, "y": scored([0.8, 0.6, 0.5])}

    assert best_alike((first, first)) == dict.fromkeys("abcd", (0, 0, 0)) | dict.fromkeys("yz", (2, 2, 2))
    assert best_alike((first, second))["z"] == (2, 2, 2)
    assert best_alike((first, second))["y"][1:] == (2, 0)
    assert best_alike(({**first, "q": scored([1.0, 0.0, 0.0])}, first)).keys() == first.keys()  # q told half of it


def test_one_group_offers_nothing() -> None:
    same = {c: scored([0.8, 0.6]) for c in "abc"}

    assert best_alike((same, same)) == {}
    assert best_alike(({}, {})) == {}
