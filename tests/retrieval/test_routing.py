"""Routing: whom a query is sent to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfed.types import FloatArray
from retrieval.routing import CentroidRouter, LearnedRouter, chosen, coverage_for, likeness, shares_of

P = np.array([[0.5, 0.3, 0.2], [0.05, 0.05, 0.9]])


def scene(n: int, seed: int = 0) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Queries (n, 8), the sums of four owners' vectors, and whose each query is (n, 4)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(4, 8))
    whose = rng.integers(4, size=n)
    queries = centres[whose] + 0.8 * rng.normal(size=(n, 8))
    return queries / np.linalg.norm(queries, axis=1, keepdims=True), 100 * centres, np.eye(4)[whose]


def named(centroids: FloatArray) -> dict[str, FloatArray]:
    return {f"o{i}": centroid for i, centroid in enumerate(centroids)}


def test_the_likeliest_are_asked() -> None:
    assert chosen(P, n_ask=1).tolist() == [[True, False, False], [False, False, True]]
    assert chosen(P, n_ask=2).tolist() == [[True, True, False], [True, False, True]]
    assert chosen(P).all()


def test_with_a_coverage_the_sure_query_asks_fewer() -> None:
    assert chosen(P, coverage=0.75).tolist() == [[True, True, False], [False, False, True]]
    assert chosen(P, coverage=1.0).all()
    assert chosen(P, coverage=0.75, n_ask=1).sum(axis=1).tolist() == [1, 1]


def test_coverage_is_found_for_a_mean_number_of_owners() -> None:
    # What is before each owner: 0, .5, .8 and 0, .9, .95; three pairs lie under the fourth smallest, .8.
    assert coverage_for(P, 1.5) == pytest.approx(0.8)
    assert chosen(P, coverage=coverage_for(P, 1.5)).sum() == 3
    assert coverage_for(P, 3) == 1.0


@given(st.integers(1, 30), st.integers(1, 6), st.floats(1, 6), st.integers(0, 2**16))
def test_everybody_asks_somebody_and_the_mean_is_kept(n: int, n_owners: int, n_ask: float, seed: int) -> None:
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(n_owners), size=n)

    asked = chosen(probabilities, coverage=coverage_for(probabilities, n_ask))

    assert (asked.sum(axis=1) >= 1).all() or round(n_ask * n) < n
    assert asked.sum() <= round(n_ask * n) or n_ask >= n_owners
    for p, row in zip(probabilities, asked, strict=True):
        assert not row.any() or p[row].min() >= p[~row].max(initial=0.0)


def test_likeness_is_the_cosine() -> None:
    near = likeness(np.array([[3.0, 4.0]]), np.array([[10.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]))

    assert near == pytest.approx(np.array([[0.6, 0.8, -0.6]]))
    queries, centroids, whose = scene(300)
    assert (likeness(queries, centroids).argmax(axis=1) == whose.argmax(axis=1)).mean() > 0.85


def test_a_centroids_length_does_not_matter() -> None:
    """It tells how many documents an owner has, and noise about it."""
    queries, centroids, _ = scene(20)

    longer = centroids * np.array([[1.0], [5.0], [0.1], [2.0]])

    assert CentroidRouter().probabilities(queries, named(longer)) == pytest.approx(
        CentroidRouter().probabilities(queries, named(centroids))
    )


def test_a_router_learns_what_centroids_do_not_say() -> None:
    """The centroids of two owners are exchanged; what was found tells."""
    queries, centroids, whose = scene(400)
    wrong = centroids[[1, 0, 2, 3]]
    held_out, _, truth = scene(400, seed=1)

    router = LearnedRouter().fit(queries, named(wrong), whose)

    def right(probabilities: FloatArray) -> float:
        return float((probabilities.argmax(axis=1) == truth.argmax(axis=1)).mean())

    assert right(CentroidRouter().probabilities(held_out, named(wrong))) < 0.6
    assert right(router.probabilities(held_out, named(wrong))) > 0.85
    assert router.probabilities(held_out, named(wrong)).sum(axis=1) == pytest.approx(np.ones(400))


def test_a_learned_router_ends_at_the_minimum_of_its_loss() -> None:
    queries, centroids, whose = scene(60)
    router = LearnedRouter().fit(queries, named(centroids), whose)

    def loss() -> float:
        logp = np.log(router.probabilities(queries, named(centroids)))
        free = np.array(list(router._of.values()))[:, :-1]
        return float(-(whose * logp).sum() + 0.5 * (free**2).sum())

    at_best = loss()
    rng = np.random.default_rng(0)
    for _ in range(10):
        step = {name: 0.05 * rng.normal(size=len(row)) for name, row in router._of.items()}
        router._of = {name: row + step[name] for name, row in router._of.items()}
        assert loss() > at_best - 1e-3
        router._of = {name: row - step[name] for name, row in router._of.items()}


def test_owners_that_are_gone_or_new_leave_the_others_as_they_were_learned() -> None:
    """Owner o0 is gone, and one has come whose centroid is nowhere near."""
    queries, centroids, whose = scene(400)
    router = LearnedRouter().fit(queries, named(centroids[[1, 0, 2, 3]]), whose)
    held_out, _, truth = scene(400, seed=1)
    left = {name: c for name, c in named(centroids[[1, 0, 2, 3]]).items() if name != "o0"} | {
        "new": -centroids.sum(axis=0)
    }

    probabilities = router.probabilities(held_out, left)

    others = truth.argmax(axis=1) > 0
    assert (probabilities.argmax(axis=1)[others] == truth.argmax(axis=1)[others] - 1).mean() > 0.85
    assert router.probabilities(held_out, {"new": centroids[0]}) == pytest.approx(np.ones((400, 1)))


def test_shares_are_of_the_hits_near_the_best() -> None:
    scores = np.array([[0.9, 0.8, -np.inf], [-np.inf] * 3])

    shares = shares_of(scores, [[2, 0, 0], []], 3)

    little = np.exp(-3.0)
    assert shares[0] == pytest.approx([little / (1 + little), 0.0, 1 / (1 + little)])
    assert shares[1] == pytest.approx([1 / 3] * 3)
