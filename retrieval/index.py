"""A client's own index: documents, the passages they are found by, and the passages' vectors.

    index = LocalIndex(SentenceEncoder())
    index.add([Document(doc_id="leave", text="...")])
    index.search(["How many days of leave are there?"], k=3)
    index.save(Path("runs/index"))

In its folder (`retrieval.store`) a generation has

    manifest.json     schema version, encoder and dimension, kind, size of passages, the next free id
    vectors.faiss     the vectors (`retrieval.vectors`)
    documents.msgpack each document's digest, metadata, passages, and where its text is
    texts.bin         the documents one after another, in UTF-8
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from promptfed.errors import ConfigError, DataError
from promptfed.types import Encoder, FloatArray, Hit, IntArray, SearchMode
from retrieval import store
from retrieval.documents import OVERLAP_WORDS, PASSAGE_WORDS, Document, packed, passages, unpacked, whole
from retrieval.lexical import LexicalIndex
from retrieval.merging import reciprocal_ranks
from retrieval.vectors import Kind, VectorArray, VectorIndex, kind_for

log = logging.getLogger("promptfed.retrieval")

SCHEMA_VERSION = 1
# What an encoder is known again by, beside its name: the vector of this text. Of one model in two number formats (say,
# bfloat16 and float32) they agree to 0.998.
PROBE, PROBE_COSINE = "Staff have thirty days of leave a year.", 0.98
# How often a folder is read again that is being replaced under our hands.
_TRIES = 5
# Passages that each of both ways of looking gives to a hybrid search, for one that is asked for, and at least.
HYBRID_DEPTH, HYBRID_LEAST = 3, 50


@dataclass(frozen=True, slots=True)
class _Entry:
    """A document as the index knows it. ``spans``: where in its text, in bytes, the passages ``rows`` are; ``place``:
    where in the file its text is, None for one that is in memory."""

    digest: bytes
    metadata: Mapping[str, Any]
    rows: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    place: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What `LocalIndex.add` came to, in documents. ``empty`` are those without a word, which it does not keep, and
    ``removed`` those that were there and are empty now."""

    new: int = 0
    replaced: int = 0
    unchanged: int = 0
    empty: int = 0
    removed: int = 0


class LocalIndex:
    """Documents of one owner. Several threads may use it.

    ``kind`` is flat, hnsw or ivf (`retrieval.vectors`); without it, what suits the number of passages. Documents are
    cut into passages of ``passage_words``, which overlap by ``overlap_words``; None: a document is one passage. Where
    the encoder has ``fits(text)``, which says whether it reads all of a text, a passage that does not fit is halved.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        kind: Kind | None = None,
        passage_words: int | None = PASSAGE_WORDS,
        overlap_words: int = OVERLAP_WORDS,
    ) -> None:
        if passage_words is not None and not 0 <= overlap_words < passage_words:
            raise ConfigError(
                f"passages of {passage_words} words can't overlap by {overlap_words}: expected 0 to {passage_words - 1}"
            )
        if kind is not None and kind not in get_args(Kind):
            raise ConfigError(f"unknown kind {kind!r} of index; known: {', '.join(get_args(Kind))}")
        self.encoder = encoder
        self._kind, self._passage_words, self._overlap_words = kind, passage_words, overlap_words
        self._documents: dict[str, _Entry] = {}
        self._owners: dict[int, tuple[str, int]] = {}  # of a passage: its document, and which of its passages it is
        self._texts: dict[str, bytes] = {}  # of documents that came since the files were written
        self._mapped: Any = b""  # the file of the others
        self._next_row = 0
        self._vectors: VectorIndex | None = None
        self._mapped_from: Path | None = None  # where the vectors are, as long as they are not in memory
        self._lexical: LexicalIndex | None = None
        self._generation: str | None = None
        self._place: Path | None = None
        self._is_saved = True
        self._probe: VectorArray | None = None  # of the encoder that the vectors are of
        self._is_probed = False
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._documents)

    def __contains__(self, doc_id: str) -> bool:
        return doc_id in self._documents

    @property
    def n_passages(self) -> int:
        return len(self._owners)

    @property
    def doc_ids(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(self._documents)

    @property
    def fingerprint(self) -> str:
        """Another for other documents, whatever their order."""
        digests = sorted(entry.digest for entry in self._documents.values())
        return hashlib.sha256(b"".join(digests)).hexdigest()

    @property
    def kind(self) -> Kind:
        """What the vectors are searched with now."""
        return self._kind or kind_for(len(self._owners))

    def add(self, documents: Iterable[Document]) -> Added:
        """Take documents in. One with an id that is there replaces the other, unless it is the same to the byte; of two
        in ``documents`` with one id, the later. If it raises, the index is as it was."""
        given = {document.doc_id: document for document in documents}
        known = {i: self._documents[i].digest for i in given if i in self._documents}
        changed = {i: d for i, d in given.items() if known.get(i) != d.digest}
        cut = {i: self._cut(d.text) for i, d in changed.items()}
        empty = [i for i, spans in cut.items() if not spans]
        contents = {i: whole(d.text).encode() for i, d in changed.items()}
        texts = [contents[i][start:stop].decode("utf-8") for i, spans in cut.items() for start, stop in spans]
        vectors = self._encode(texts)
        with self._lock:
            rows = np.arange(self._next_row, self._next_row + len(texts))
            if len(texts):  # what may fail comes before what is changed
                self._is_saved = False
                self._writable(vectors.shape[1]).add(vectors, rows)
            self._next_row += len(texts)
            self.delete([i for i in changed if i in self._documents])
            at = 0
            for doc_id, spans in cut.items():
                if spans:
                    mine = tuple(rows[at : at + len(spans)].tolist())
                    document = changed[doc_id]
                    self._documents[doc_id] = _Entry(document.digest, dict(document.metadata), mine, tuple(spans))
                    self._owners.update({row: (doc_id, number) for number, row in enumerate(mine)})
                    self._texts[doc_id] = contents[doc_id]
                    at += len(spans)
            if len(texts):
                self._vectors = self._writable().grown(self.kind)
                self._lexical = None
        replaced = sum(i in known for i in changed if i not in empty)
        return Added(
            new=len(changed) - len(empty) - replaced,
            replaced=replaced,
            unchanged=len(given) - len(changed),
            empty=len(empty),
            removed=sum(i in known for i in empty),
        )

    def delete(self, doc_ids: Iterable[str]) -> int:
        """Forget documents; returns how many of them were there. Their last trace goes from the disk with `save`."""
        with self._lock:
            entries = {i: self._documents[i] for i in dict.fromkeys(doc_ids) if i in self._documents}
            rows = [row for entry in entries.values() for row in entry.rows]
            if rows:
                self._is_saved = False
                self._writable().remove(np.array(rows, dtype=np.int64))
                self._lexical = None
            for row in rows:
                del self._owners[row]
            for doc_id in entries:
                del self._documents[doc_id]
                self._texts.pop(doc_id, None)
            return len(entries)

    def search(self, queries: Sequence[str], k: int, mode: SearchMode = "dense") -> list[list[Hit]]:
        """The ``k`` best passages for each query, the best first: by cosine, by BM25, or by reciprocal ranks of both.

        ``Hit.score`` is higher for better, on the mode's own scale. Raises `ConfigError` for a ``k`` below 1.
        """
        vectors = self._query_vectors(queries, mode)
        with self._lock:
            found = self._search_rows(queries, vectors, k, mode)
            return [[self.hit(row, score) for score, row in one] for one in found]

    def search_rows(self, queries: Sequence[str], k: int, mode: SearchMode = "dense") -> list[list[tuple[float, int]]]:
        """As `search`: (score, passage id)."""
        vectors = self._query_vectors(queries, mode)
        with self._lock:
            return self._search_rows(queries, vectors, k, mode)

    def _query_vectors(self, queries: Sequence[str], mode: SearchMode) -> VectorArray | None:
        if mode not in get_args(SearchMode):
            raise ConfigError(f"unknown mode {mode!r} of search; known: {', '.join(get_args(SearchMode))}")
        return None if mode == "lexical" else self._encode([whole(query) for query in queries])

    def _search_rows(
        self, queries: Sequence[str], vectors: VectorArray | None, k: int, mode: SearchMode
    ) -> list[list[tuple[float, int]]]:
        _check_k(k)
        if vectors is None:
            return [list(zip(*self._by_words(query, k), strict=True)) for query in queries]
        if mode == "dense":
            return _pairs(*self.search_vectors(vectors, k))
        depth = max(HYBRID_LEAST, HYBRID_DEPTH * k)
        dense = _pairs(*self.search_vectors(vectors, depth))
        lexical = [self._by_words(query, depth)[1].tolist() for query in queries]
        return [
            [(score, row) for row, score in reciprocal_ranks([[row for _, row in near], worded])[:k]]
            for near, worded in zip(dense, lexical, strict=True)
        ]

    def search_vectors(self, vectors: FloatArray | VectorArray, k: int) -> tuple[VectorArray, IntArray]:
        """Cosines and passage ids, (n, k) each, the nearest first; id -1 where there are fewer. ``vectors``: (n,
        dimension), unit length. Raises `ConfigError` for another dimension."""
        _check_k(k)
        with self._lock:
            if self._vectors is None:
                return np.full((len(vectors), k), -np.inf, dtype=np.float32), np.full((len(vectors), k), -1)
            if vectors.shape[1] != self._vectors.dimension:
                raise ConfigError(
                    f"a query's vector has {vectors.shape[1]} numbers, those of this index "
                    f"{self._vectors.dimension}: encode queries with {self.encoder.encoder_id!r}"
                )
            return self._vectors.search(vectors.astype(np.float32), k)

    def hit(self, row: int, score: float) -> Hit:
        """The passage with that id."""
        doc_id, number = self._owners[row]
        return Hit(
            doc_id=doc_id,
            passage=number,
            score=float(score),
            text=self._passage(doc_id, number),
            metadata=self._documents[doc_id].metadata,
        )

    def find(self, row: int) -> Hit | None:
        """The passage with that id, or None where it is gone."""
        with self._lock:
            return self.hit(row, 0.0) if row in self._owners else None

    def document(self, doc_id: str) -> Document:
        """As it was added. Raises `KeyError` for one that is not there."""
        return Document(
            doc_id=doc_id, text=self._content(doc_id).decode("utf-8"), metadata=self._documents[doc_id].metadata
        )

    def passages(self, doc_id: str) -> list[str]:
        """A document's passages. Raises `KeyError` for one that is not there."""
        return [self._passage(doc_id, number) for number in range(len(self._documents[doc_id].rows))]

    def document_vectors(self) -> tuple[VectorArray, list[str]]:
        """One vector a document, the mean of its passages', (n, dimension), and the documents' ids."""
        if self._vectors is None:
            return self._encode([]), []
        with self._lock:
            return self._document_vectors(self._vectors)

    def _document_vectors(self, index: VectorIndex) -> tuple[VectorArray, list[str]]:
        vectors, rows = index.vectors()
        ids = list(self._documents)
        place = {doc_id: i for i, doc_id in enumerate(ids)}
        of = np.array([place[self._owners[row][0]] for row in rows.tolist()], dtype=np.int64)
        total = np.zeros((len(ids), vectors.shape[1]), dtype=np.float32)
        np.add.at(total, of, vectors)
        total /= np.bincount(of, minlength=len(ids))[:, None]
        return total, ids

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Write it all; a process that is killed meanwhile leaves the folder as it was before or as it is after. Into
        another folder than it came from, that is a copy, which it goes on with.

        Raises `DataError` where the folder holds an index that this one did not come from, or that was saved by
        somebody else since; where it can't be written; and, with all saved, where what was there before can't be
        removed.
        """
        place = folder.resolve()
        with self._lock:
            if self._vectors is not None:
                self._vectors = self._writable().grown(self.kind)
            before = self._generation if place == self._place else None
            (self._generation, wrong), self._place = store.replace(folder, before, self._fill), place
            self._is_saved = True
            if wrong is not None:
                raise wrong

    @classmethod
    def open(cls, folder: Path, encoder: Encoder) -> LocalIndex:
        """The index in ``folder``. Vectors and passages are mapped: they come into memory as searches need them.

        What a process that was killed left of an index before this one is removed. Raises `DataError` for a folder
        without a whole index, and `ConfigError` for one made with another encoder. Another encoder of the same name is
        found out when it is first used.
        """
        if os.access(folder, os.W_OK):
            try:
                store.sweep(folder)
            except DataError as error:
                log.warning("%s", error)  # what can be read is read
        for _ in range(_TRIES):
            generation = store.current(folder)
            try:
                return cls._read(generation, encoder)
            except (DataError, OSError, ValueError, TypeError, KeyError, EOFError) as error:
                if store.current(folder) != generation:
                    continue  # replaced while it was read
                if isinstance(error, DataError):
                    raise
                what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({type(error).__name__})"
                raise DataError(f"{folder}: a file of its index is {what}; restore it from a copy") from None
        raise DataError(f"{folder}: is being replaced all the time; try again")

    def reopened(self) -> LocalIndex:
        """This index; or, where somebody has saved another state of it since it was opened, that one. What was changed
        here and not saved is kept. Raises as `open`."""
        with self._lock:
            if self._place is None or not self._is_saved or store.current(self._place).name == self._generation:
                return self
        return LocalIndex.open(self._place, self.encoder)

    @classmethod
    def _read(cls, generation: Path, encoder: Encoder) -> LocalIndex:
        manifest = _manifest(generation / "manifest.json")
        if manifest["encoder_id"] != encoder.encoder_id:
            raise ConfigError(
                f"{generation.parent}: made with encoder {manifest['encoder_id']!r}, opened with "
                f"{encoder.encoder_id!r}: vectors of two encoders can't be compared. Open it with the one that it was "
                "made with, or add its documents to a new index"
            )
        out = cls(
            encoder,
            kind=manifest["kind_asked"],
            passage_words=manifest["passage_words"],
            overlap_words=manifest["overlap_words"],
        )
        out._generation, out._place = generation.name, generation.parent.resolve()
        out._next_row = manifest["next_row"]
        entries = unpacked((generation / "documents.msgpack").read_bytes())
        out._documents = {i: _Entry(digest, meta, *map(tuple, more)) for i, digest, meta, *more in entries}
        out._owners = {row: (i, n) for i, entry in out._documents.items() for n, row in enumerate(entry.rows)}
        out._mapped = _mapped(generation / "texts.bin")
        if len(out._mapped) != manifest["n_bytes"]:
            raise DataError(f"{generation.parent}: its texts and documents don't match; restore it from a copy")
        if manifest["dimension"]:
            out._mapped_from = generation / "vectors.faiss"
            out._vectors = VectorIndex.read(out._mapped_from, manifest["kind"], mapped=True)
            if probe := manifest.get("probe"):  # promptfed has written it since it knows of it
                out._probe = np.frombuffer(bytes.fromhex(probe), dtype="<f2").astype(np.float32)
        return out

    def _fill(self, aside: Path) -> None:
        documents, at = [], 0
        with (aside / "texts.bin").open("wb") as file:
            for i, e in self._documents.items():
                at, start = at + file.write(self._content(i)), at
                documents.append([i, e.digest, dict(e.metadata), e.rows, e.spans, (start, at)])
        (aside / "documents.msgpack").write_bytes(packed(documents))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "encoder_id": self.encoder.encoder_id,
            "dimension": self._vectors.dimension if self._vectors is not None else 0,
            "kind": self._vectors.kind if self._vectors is not None else self.kind,
            "kind_asked": self._kind,
            "passage_words": self._passage_words,
            "overlap_words": self._overlap_words,
            "next_row": self._next_row,
            "n_documents": len(self._documents),
            "n_bytes": at,
            "probe": self._probe.astype("<f2").tobytes().hex() if self._probe is not None else "",
        }
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if self._vectors is not None:
            self._vectors.write(aside / "vectors.faiss")

    # ------------------------------------------------------------ inside

    def _cut(self, text: str) -> list[tuple[int, int]]:
        """Where its passages are, in bytes."""
        if self._passage_words is None:
            if not self._fits(text):
                log.warning("a document is longer than %s reads: its end is in no vector", self.encoder.encoder_id)
            return [(0, len(whole(text).encode()))] if text.strip() else []
        spans = list(passages(text, self._passage_words, self._overlap_words, self._fits))
        place, at, n = {}, 0, 0
        for end in sorted({end for span in spans for end in span}):
            n += len(whole(text[at:end]).encode())
            place[end], at = n, end
        return [(place[start], place[stop]) for start, stop in spans]

    def _content(self, doc_id: str) -> bytes:
        if (place := self._documents[doc_id].place) is None:
            return self._texts[doc_id]
        return bytes(self._mapped[place[0] : place[1]])

    def _passage(self, doc_id: str, number: int) -> str:
        start, stop = self._documents[doc_id].spans[number]
        return self._content(doc_id)[start:stop].decode("utf-8")

    def _fits(self, text: str) -> bool:
        fits: Callable[[str], bool] | None = getattr(self.encoder, "fits", None)
        return fits is None or fits(whole(text))

    def check_encoder(self) -> None:
        """Raises `ConfigError` where the encoder has the name of the one that the index was made with, and is another.
        It is checked before it is first used too."""
        if self._is_probed:
            return
        with self._lock:
            probe = self.encoder.encode([PROBE])[0].astype(np.float32)
            was = probe if self._probe is None else self._probe
            is_same = was.shape == probe.shape and _cosine(was, probe) >= PROBE_COSINE
            if self._probe is None and self._owners and self._vectors is not None:  # of before there were probes
                vector = self.encoder.encode([self._passage(*next(iter(self._owners.values())))]).astype(np.float32)
                is_same = vector.shape[1] == self._vectors.dimension
                is_same = is_same and float(self._vectors.search(vector, 1)[0][0, 0]) >= PROBE_COSINE
            if not is_same:
                raise ConfigError(
                    f"the encoder that is called {self.encoder.encoder_id!r} now is another than the one that this "
                    "index was made with: open it with that one, or add its documents to a new index"
                )
            self._probe, self._is_probed = was, True

    def _encode(self, texts: Sequence[str]) -> VectorArray:
        """Raises `ConfigError` as `check_encoder` does, and for what is no vector."""
        self.check_encoder()
        vectors = self.encoder.encode(texts).astype(np.float32)
        if not np.isfinite(vectors).all():
            raise ConfigError(f"encoder {self.encoder.encoder_id!r} gave vectors that are not of finite numbers")
        return vectors

    def _writable(self, dimension: int = 0) -> VectorIndex:
        """The vectors, in memory."""
        if self._vectors is None:
            self._vectors = VectorIndex(dimension, self._kind or "flat")
        elif self._mapped_from is not None:
            if not self._mapped_from.exists():
                raise DataError(f"{self._mapped_from.parent.parent}: changed since it was opened; open it anew")
            self._vectors = VectorIndex.read(self._mapped_from, self._vectors.kind, mapped=False)
        self._mapped_from = None
        return self._vectors

    def _by_words(self, query: str, k: int) -> tuple[FloatArray, IntArray]:
        if self._lexical is None:
            self._lexical = LexicalIndex(
                [self._passage(*owner) for owner in self._owners.values()],
                np.fromiter(self._owners, np.int64, len(self._owners)),
            )
        return self._lexical.search(query, k)


def _cosine(a: VectorArray, b: VectorArray) -> float:
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)


def _pairs(scores: VectorArray, rows: IntArray) -> list[list[tuple[float, int]]]:
    return [
        [(score, row) for score, row in zip(mine, ids, strict=True) if row >= 0]
        for mine, ids in zip(scores.tolist(), rows.tolist(), strict=True)
    ]


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"a search for k = {k} passages: expected 1 or more")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not the manifest of an index; restore the folder from a copy") from None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: an index of schema version {version}, this promptfed reads {SCHEMA_VERSION}: add its documents "
            "to a new index"
        )
    return manifest


def _mapped(path: Path) -> Any:
    if not path.stat().st_size:
        return b""  # nothing can't be mapped
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
