"""Documents, and the passages that an index finds them by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from promptfed.errors import DataError
from promptfed.tables import records

# Words of a passage, and how many of them the next one begins with. all-MiniLM-L6-v2 reads 256 tokens, about 180 words.
PASSAGE_WORDS, OVERLAP_WORDS = 180, 30

# A run of letters without a space is a word, and several where it is long: not all scripts have spaces.
_WORD = re.compile(r"\S{1,24}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text under an id of its owner's choosing. ``metadata`` is what `msgpack` takes, and stays at the owner."""

    doc_id: str
    text: str = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def digest(self) -> bytes:
        """Of all that it holds: the same document added again is known by it. Raises `DataError` for metadata that
        can't be kept."""
        whole = [self.doc_id, self.text, sorted(self.metadata.items())]
        try:
            return hashlib.sha256(msgpack.packb(whole, unicode_errors="surrogatepass")).digest()
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"document {self.doc_id!r}: metadata can't be kept ({type(error).__name__}); expected texts, numbers, "
                "lists and mappings"
            ) from None


def passages(text: str, n_words: int, n_overlap: int) -> Iterator[tuple[int, int]]:
    """Where ``text`` has windows of ``n_words`` words, each beginning ``n_overlap`` words before the end of the last
    one. None in a text without words."""
    words = [match.span() for match in _WORD.finditer(text)]
    start = 0
    while start < len(words):
        stop = min(start + n_words, len(words))
        yield words[start][0], words[stop - 1][1]
        if stop == len(words):
            return
        start = stop - n_overlap


def read_documents(path: Path, *, id_column: str = "id", text_column: str = "text") -> list[Document]:
    """The documents of a CSV file, whose other columns are their metadata, or of a folder: a text file is a document
    there, and its path in the folder its id. Files are in UTF-8; those of a folder end in .txt or .md.

    Raises `DataError` naming file and row, never a text.
    """
    if path.is_dir():
        return _of_folder(path)
    out: dict[str, Document] = {}
    for number, record in records(path, [id_column, text_column]):
        doc_id = record.pop(id_column).strip()
        if not doc_id:
            raise DataError(f"{path}, row {number}: column {id_column!r} is empty; expected a document's id")
        if doc_id in out:
            raise DataError(f"{path}, row {number}: a second document with the id of an earlier one")
        out[doc_id] = Document(doc_id=doc_id, text=record.pop(text_column), metadata=record)
    return list(out.values())


def _of_folder(folder: Path) -> list[Document]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
    if not files:
        raise DataError(f"{folder}: no .txt or .md file in it")
    out = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
        except OSError as error:
            raise DataError(f"{file}: can't be read ({error.strerror})") from None
        out.append(Document(doc_id=file.relative_to(folder).as_posix(), text=text))
    return out
