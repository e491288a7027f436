"""The Dirichlet partitioner: nothing lost, nobody empty, the same shares for train and test."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.data import Rows
from clients.partition import dirichlet
from promptfed.errors import DataError


def rows(n: int, n_labels: int = 2, name: str = "text") -> Rows:
    return [("all", f"{name} {i}", f"label{i % n_labels}") for i in range(n)]


@given(
    n=st.integers(1, 80),
    n_labels=st.integers(1, 4),
    n_clients=st.integers(1, 12),
    alpha=st.sampled_from([0.01, 0.1, 0.5, 5.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_row_goes_to_one_client_and_nobody_is_empty(
    n: int, n_labels: int, n_clients: int, alpha: float, seed: int
) -> None:
    train, test = rows(max(n, n_clients), n_labels), rows(7, n_labels, "test")

    split_train, split_test = dirichlet([train, test], n_clients, alpha, seed)

    for before, after in ((train, split_train), (test, split_test)):
        assert Counter((t, y) for _, t, y in before) == Counter((t, y) for _, t, y in after)
    assert len({c for c, _, _ in split_train}) == n_clients
    assert {c for c, _, _ in split_test} <= {c for c, _, _ in split_train}


def test_fewer_rows_than_clients_is_refused() -> None:
    with pytest.raises(DataError, match=r"3.*5|5.*3"):
        dirichlet([rows(3)], 5, 0.5, seed=1)


def test_the_same_seed_deals_alike_and_another_differently() -> None:
    train = rows(60)

    assert dirichlet([train], 4, 0.5, seed=1) == dirichlet([train], 4, 0.5, seed=1)
    assert dirichlet([train], 4, 0.5, seed=1) != dirichlet([train], 4, 0.5, seed=2)


def test_ids_sort_as_numbers_do() -> None:
    (split,) = dirichlet([rows(400)], 12, 5.0, seed=1)

    ids = sorted({c for c, _, _ in split})
    assert ids[0] == "client00"
    assert ids[2] == "client02"
    assert ids[-1] == "client11"


def shares(split: Rows, n_clients: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    counts = Counter((c, y) for c, _, y in split)
    table = np.array([[counts[f"client{c}", f"label{k}"] for k in range(2)] for c in range(n_clients)], dtype=float)
    return table / table.sum(axis=0)


def test_train_and_test_have_the_same_shares() -> None:
    train, test = dirichlet([rows(2000), rows(1000, name="test")], 4, 0.5, seed=3)

    # Rounding moves at most a row or so.
    assert shares(train, 4) == pytest.approx(shares(test, 4), abs=0.005)


def test_a_small_alpha_is_a_strong_skew() -> None:
    def skew(alpha: float) -> float:
        """Mean over seeds of the largest share that one client has of a label; a quarter when even."""
        tables = [shares(dirichlet([rows(400)], 4, alpha, seed)[0], 4) for seed in range(10)]
        return float(np.mean([t.max(axis=0).mean() for t in tables]))

    assert skew(100.0) == pytest.approx(0.28, abs=0.04)
    assert skew(0.05) > 0.8
    assert skew(0.05) > skew(0.5) > skew(100.0)
