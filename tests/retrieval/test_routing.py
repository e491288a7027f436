"""Routing: whom a query is sent to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfed.errors import ConfigError
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

    assert CentroidRouter().probabilities(queries, longer) == pytest.approx(
        CentroidRouter().probabilities(queries, centroids)
    )


def test_a_router_learns_what_centroids_do_not_say() -> None:
    """The centroids of two owners are exchanged; what was found tells."""
    queries, centroids, whose = scene(400)
    wrong = centroids[[1, 0, 2, 3]]
    held_out, _, truth = scene(400, seed=1)

    router = LearnedRouter().fit(queries, wrong, whose)

    def right(probabilities: FloatArray) -> float:
        return float((probabilities.argmax(axis=1) == truth.argmax(axis=1)).mean())

    assert right(CentroidRouter().probabilities(held_out, wrong)) < 0.6
    assert right(router.probabilities(held_out, wrong)) > 0.85
    assert router.probabilities(held_out, wrong).sum(axis=1) == pytest.approx(np.ones(400))


def test_a_learned_routers_gradient_is_that_of_its_loss() -> None:
    """A fit that ends at a minimum: no small step is better."""
    queries, centroids, whose = scene(60)
    router = LearnedRouter().fit(queries, centroids, whose)

    def loss() -> float:
        logp = np.log(router.probabilities(queries, centroids))
        assert router._weights is not None
        return float(-(whose * logp).sum() + 0.5 * (router._weights[:, :-1] ** 2).sum())

    at_best = loss()
    rng = np.random.default_rng(0)
    assert router._weights is not None
    for _ in range(10):
        step = 0.05 * rng.normal(size=router._weights.shape)
        router._weights += step
        assert loss() > at_best - 1e-3
        router._weights -= step


def test_a_router_for_other_owners_is_refused() -> None:
    queries, centroids, whose = scene(20)

    with pytest.raises(ConfigError, match="fitted on 0 owners, and there are 4"):
        LearnedRouter().probabilities(queries, centroids)
    with pytest.raises(ConfigError, match="fitted on 4 owners, and there are 3"):
        LearnedRouter().fit(queries, centroids, whose).probabilities(queries, centroids[:3])


def test_shares_are_of_the_hits_near_the_best() -> None:
    scores = np.array([[0.9, 0.8, -np.inf], [-np.inf] * 3])

    shares = shares_of(scores, [[2, 0, 0], []], 3)

    little = np.exp(-3.0)
    assert shares[0] == pytest.approx([little / (1 + little), 0.0, 1 / (1 + little)])
    assert shares[1] == pytest.approx([1 / 3] * 3)
