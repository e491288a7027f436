"""Unit vectors under whole numbers, searched by cosine: three of faiss's indices behind one class.

| kind | search | after a removal |
|---|---|---|
| flat | exact | nothing of it is left |
| hnsw | approximate: a graph of neighbours (Malkov & Yashunin, TPAMI 2020) | a tombstone until it is built anew |
| ivf | approximate: the nearest cells of k-means | cells that it helped to learn, until they are learned anew |

`purge` builds anew what still knows of a removed vector, and `write` does so first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt

from promptfed.errors import DataError
from promptfed.types import IntArray

Kind = Literal["flat", "hnsw", "ivf"]
VectorArray = npt.NDArray[np.float32]

# Vectors up to which a kind is taken where none was asked for; from there on IVF.
FLAT_MAX = 100_000
HNSW_MAX = 1_000_000
# Neighbours of a node of the graph, and candidates that are kept while one is added or looked for.
HNSW_NEIGHBOURS, HNSW_BUILDING, HNSW_SEARCHING = 32, 80, 128
# k-means wants some 40 vectors a cell; a search looks into this share of the cells, and into so many at least.
PER_CELL, PROBED_SHARE, PROBED_LEAST = 40, 1 / 16, 8
# Share of tombstones from which the graph is built anew at once: a search pays for each.
TOMBSTONES_MAX = 0.2


def kind_for(n: int) -> Kind:
    """The kind for ``n`` vectors."""
    return "flat" if n <= FLAT_MAX else "hnsw" if n <= HNSW_MAX else "ivf"


class VectorIndex:
    """Vectors (float32, unit length) of ``dimension`` numbers under ids that the caller keeps unique."""

    def __init__(self, dimension: int, kind: Kind = "flat") -> None:
        self.dimension, self.kind = dimension, kind
        self._removed: set[int] = set()  # tombstones of hnsw; for ivf, what its cells were learned with
        self._index: Any = None if kind == "ivf" else self._empty()

    def __len__(self) -> int:
        hidden = len(self._removed) if self.kind == "hnsw" else 0
        return 0 if self._index is None else int(self._index.ntotal) - hidden

    def add(self, vectors: VectorArray, ids: IntArray) -> None:
        """``vectors`` (n, dimension) under ``ids`` (n,), none of which it has."""
        if not len(ids):
            return
        if self._index is None:
            self._index = self._trained(vectors)
        self._index.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), ids)

    def remove(self, ids: IntArray) -> None:
        """Forget ``ids``, which it has: no search finds them from now on."""
        if not len(ids):
            return
        self._removed.update(ids.tolist())
        if self.kind == "hnsw":
            if len(self._removed) > TOMBSTONES_MAX * self._index.ntotal:
                self._rebuild()
            return
        self._index.remove_ids(ids)
        if self.kind == "flat":
            self._removed.clear()

    def search(self, queries: VectorArray, k: int) -> tuple[VectorArray, IntArray]:
        """Cosines and ids, (n, k) each, the nearest first; id -1 where there are fewer than ``k``."""
        if not len(self):
            return np.full((len(queries), k), -np.inf, dtype=np.float32), np.full((len(queries), k), -1)
        scores, ids = self._index.search(
            np.ascontiguousarray(queries, dtype=np.float32), k, params=self._search_parameters(k)
        )
        return scores, ids

    def vectors(self) -> tuple[VectorArray, IntArray]:
        """All vectors (n, dimension) and their ids (n,), in no order that means anything."""
        if self._index is None or not self._index.ntotal:
            return np.zeros((0, self.dimension), dtype=np.float32), np.zeros(0, dtype=np.int64)
        if self.kind == "ivf":
            return self._of_cells()
        ids = faiss.vector_to_array(self._index.id_map).astype(np.int64)
        vectors = self._index.index.reconstruct_n(0, len(ids))
        kept = ~np.isin(ids, np.fromiter(self._removed, dtype=np.int64, count=len(self._removed)))
        return np.asarray(vectors[kept]), ids[kept]

    def grown(self, kind: Kind | None = None) -> VectorIndex:
        """Itself, or built anew where it is to be of another ``kind``, or has far too few cells for what has been added
        since they were learned."""
        if (kind or self.kind) != self.kind:
            other = VectorIndex(self.dimension, kind or self.kind)
            other.add(*self.vectors())
            return other
        if self.kind == "ivf" and self._index is not None and self._index.nlist < _n_cells(len(self)) / 2:
            self._rebuild()
        return self

    def purge(self) -> None:
        """Build anew what still knows of a removed vector."""
        if self._removed:
            self._rebuild()

    def write(self, path: Path) -> None:
        """Into one file, without a trace of what was removed. Raises `DataError` where it can't be written."""
        self.purge()
        try:
            faiss.write_index(self._empty() if self._index is None else self._index, str(path))
        except RuntimeError:
            raise DataError(f"{path}: can't be written; is the disk full?") from None

    @classmethod
    def read(cls, path: Path, kind: Kind, *, mapped: bool) -> VectorIndex:
        """``mapped``: pages of the file come into memory as searches need them; nothing may be added or removed then.

        Raises `DataError` for a file that is none of faiss's.
        """
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError:
            raise DataError(
                f"{path}: not a whole faiss index; restore the folder from a copy, or add its documents to a new index"
            ) from None
        out = cls(index.d, kind)
        out._index = None if kind == "ivf" and not index.is_trained else index
        return out

    def _rebuild(self) -> None:
        vectors, ids = self.vectors()
        self._removed.clear()
        self._index = None if self.kind == "ivf" else self._empty()
        self.add(vectors, ids)

    def _empty(self, n_cells: int = 1) -> Any:
        factory = {"flat": "IDMap2,Flat", "hnsw": f"IDMap2,HNSW{HNSW_NEIGHBOURS}", "ivf": f"IVF{n_cells},Flat"}
        index = faiss.index_factory(self.dimension, factory[self.kind], faiss.METRIC_INNER_PRODUCT)
        if self.kind == "hnsw":
            faiss.downcast_index(index.index).hnsw.efConstruction = HNSW_BUILDING
        return index

    def _trained(self, vectors: VectorArray) -> Any:
        """Cells of k-means over ``vectors``, as many as there are vectors for."""
        index = self._empty(_n_cells(len(vectors)))
        index.train(np.ascontiguousarray(vectors, dtype=np.float32))
        return index

    def _search_parameters(self, k: int) -> Any:
        if self.kind == "ivf":
            return faiss.SearchParametersIVF(nprobe=max(PROBED_LEAST, round(self._index.nlist * PROBED_SHARE)))
        if self.kind == "flat":
            return None
        looked = max(HNSW_SEARCHING, 2 * k)
        if not self._removed:
            return faiss.SearchParametersHNSW(efSearch=looked)
        gone = faiss.IDSelectorBatch(np.fromiter(self._removed, dtype=np.int64, count=len(self._removed)))
        return faiss.SearchParametersHNSW(efSearch=looked, sel=faiss.IDSelectorNot(gone))

    def _of_cells(self) -> tuple[VectorArray, IntArray]:
        lists, vectors, ids = self._index.invlists, [], []
        for cell in range(self._index.nlist):
            n = lists.list_size(cell)
            if n:
                codes = faiss.rev_swig_ptr(lists.get_codes(cell), n * lists.code_size)
                vectors.append(codes.view(np.float32).reshape(n, self.dimension).copy())
                ids.append(faiss.rev_swig_ptr(lists.get_ids(cell), n).copy())
        return np.concatenate(vectors), np.concatenate(ids)


def _n_cells(n: int) -> int:
    """For ``n`` vectors."""
    return max(1, min(round(4 * math.sqrt(n)), n // PER_CELL))
