"""Vector indices: what is added is found, what is removed is gone, whatever the kind."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from promptfed.errors import DataError
from promptfed.types import IntArray
from retrieval import vectors
from retrieval.vectors import Kind, VectorArray, VectorIndex, kind_for

KINDS = get_args(Kind)


def clustered(n: int, seed: int = 0, n_clusters: int = 10) -> VectorArray:
    """Unit vectors of 16 numbers around some centres, as texts of some topics have."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(n_clusters, 16))
    x = centres[rng.integers(n_clusters, size=n)] + 0.7 * rng.normal(size=(n, 16))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def ids(start: int, n: int) -> IntArray:
    return np.arange(start, start + n, dtype=np.int64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_is_its_own_nearest(kind: Kind) -> None:
    x = clustered(600)
    index = VectorIndex(16, kind)
    index.add(x, ids(1000, 600))

    scores, found = index.search(x[:50], 3)

    assert found[:, 0].tolist() == list(range(1000, 1050))
    assert scores[:, 0] == pytest.approx(np.ones(50), abs=1e-5)
    assert (np.diff(scores, axis=1) <= 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_the_true_ones_for_at_least_95_in_100(kind: Kind) -> None:
    x, queries = clustered(3000), clustered(100, seed=1)
    index = VectorIndex(16, kind)
    index.add(x, ids(0, 3000))

    _, found = index.search(queries, 10)

    true = np.argsort(-queries @ x.T, axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), true.tolist(), strict=True)])
    assert recall == 1.0 if kind == "flat" else recall >= 0.95


@pytest.mark.parametrize("share", [0.1, 0.5])  # below and above the share of tombstones that a graph is left with
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_removed_is_not_found_and_everything_else_is(kind: Kind, share: float) -> None:
    x, n_gone = clustered(1000), int(1000 * share)
    index = VectorIndex(16, kind)
    index.add(x, ids(0, 1000))

    index.remove(ids(0, n_gone))

    _, found = index.search(x[:n_gone], 5)
    assert len(index) == 1000 - n_gone
    assert found.min() >= n_gone
    _, found = index.search(x[n_gone:], 1)
    assert np.mean(found[:, 0] == ids(n_gone, 1000 - n_gone)) > 0.99
    kept, numbers = index.vectors()
    order = np.argsort(numbers)
    assert numbers[order].tolist() == list(range(n_gone, 1000))
    assert kept[order] == pytest.approx(x[n_gone:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_no_trace_of_a_removed_vector(tmp_path: Path, kind: Kind) -> None:
    """The file is byte for byte that of an index which never had it."""
    x = clustered(500)
    had, never = VectorIndex(16, kind), VectorIndex(16, kind)
    had.add(x, ids(0, 500))
    had.remove(ids(490, 10))
    never.add(x[:490], ids(0, 490))

    had.write(tmp_path / "had")
    never.write(tmp_path / "never")

    content = (tmp_path / "had").read_bytes()
    assert x[495].tobytes() not in content
    assert x[5].tobytes() in content
    if kind != "ivf":  # whose cells are filled in the order of the cells before
        assert content == (tmp_path / "never").read_bytes()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read_back(tmp_path: Path, kind: Kind, mapped: bool) -> None:
    x = clustered(400)
    index = VectorIndex(16, kind)
    index.add(x, ids(0, 400))
    index.write(tmp_path / "index")

    back = VectorIndex.read(tmp_path / "index", kind, mapped=mapped)

    for mine, its in zip(index.search(x, 4), back.search(x, 4), strict=True):
        assert np.array_equal(mine, its)
    assert len(back) == 400


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_index_finds_nothing_and_can_be_written(tmp_path: Path, kind: Kind) -> None:
    index = VectorIndex(16, kind)

    scores, found = index.search(clustered(2), 3)
    index.write(tmp_path / "index")
    back = VectorIndex.read(tmp_path / "index", kind, mapped=False)
    back.add(clustered(5), ids(0, 5))

    assert (found == -1).all()
    assert np.isneginf(scores).all()
    assert len(back) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_holds_the_same_vectors(kind: Kind) -> None:
    x = clustered(300)
    index = VectorIndex(16, "flat")
    index.add(x, ids(0, 300))

    other = index.grown(kind)

    assert other.kind == kind
    assert (other is index) == (kind == "flat")
    assert other.search(x, 1)[1][:, 0].tolist() == list(range(300))


def test_cells_are_learned_anew_when_many_more_vectors_have_come() -> None:
    index = VectorIndex(16, "ivf")
    index.add(clustered(100), ids(0, 100))
    index.add(clustered(4000, seed=2), ids(100, 4000))
    few = index._index.nlist

    index = index.grown()

    assert few == 2
    assert index._index.nlist == 102
    assert len(index) == 4100


def test_size_decides_the_kind() -> None:
    assert [kind_for(n) for n in (0, 100_000, 100_001, 1_000_000, 1_000_001)] == ["flat", "flat", "hnsw", "hnsw", "ivf"]


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    index = VectorIndex(16)
    index.add(clustered(100), ids(0, 100))
    index.write(tmp_path / "index")
    whole = (tmp_path / "index").read_bytes()
    (tmp_path / "index").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(DataError, match="not a whole faiss index"):
        VectorIndex.read(tmp_path / "index", "flat", mapped=False)


def test_tombstones_are_few() -> None:
    """A graph is built anew as soon as a fifth of it is gone."""
    index = VectorIndex(16, "hnsw")
    index.add(clustered(100), ids(0, 100))

    index.remove(ids(0, 20))
    assert index._index.ntotal == 100
    index.remove(ids(20, 1))

    assert index._index.ntotal == len(index) == 79
    assert vectors.TOMBSTONES_MAX == 0.2
