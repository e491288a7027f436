"""Documents, and the passages that an index finds them by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from promptfed.errors import DataError
from promptfed.tables import records

# Words of a passage, and how many of them the next one begins with. all-MiniLM-L6-v2 reads 256 tokens, about 180 words
# of English prose; what is longer than the encoder reads is cut further.
PASSAGE_WORDS, OVERLAP_WORDS = 180, 30

# A run of letters without a space is a word, and several where it is long: not all scripts have spaces.
_WORD = re.compile(r"\S{1,24}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text under an id of its owner's choosing. ``metadata`` is what `msgpack` takes, and stays at the owner.

    Raises `DataError` for an id that is empty, or not to be written in UTF-8 (of a file whose name is in another code).
    """

    doc_id: str
    text: str = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.doc_id:
            raise DataError("a document's id is empty; expected a name of its own")
        try:
            self.doc_id.encode()
        except UnicodeEncodeError:
            raise DataError(f"document {self.doc_id!a}: its id is not text in UTF-8; rename it") from None

    @property
    def digest(self) -> bytes:
        """Of all that it holds: the same document added again is known by it. Raises `DataError` for metadata that
        can't be kept."""
        try:
            unpacked(packed(dict(self.metadata)))  # not all that can be packed can be read again
            return hashlib.sha256(packed([self.doc_id, self.text, sorted(self.metadata.items())])).digest()
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"document {self.doc_id!r}: metadata can't be kept ({type(error).__name__}); expected texts, numbers, "
                "lists and mappings"
            ) from None


def whole(text: str) -> str:
    """Half of a surrogate pair is no character and becomes a question mark."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def packed(value: Any) -> bytes:
    """As an index keeps it; half a surrogate pair too."""
    out: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return out


def unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data, unicode_errors="surrogatepass", strict_map_key=False)


def passages(
    text: str, n_words: int, n_overlap: int, fits: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[int, int]]:
    """Where ``text`` has windows of ``n_words`` words, each beginning ``n_overlap`` words before the end of the last
    one. One that does not fit is halved. None in a text without words."""
    words = [match.span() for match in _WORD.finditer(text)]
    start = 0
    while start < len(words):
        stop = min(start + n_words, len(words))
        yield from _parts(text, words[start:stop], fits)
        if stop == len(words):
            return
        start = stop - n_overlap


def _parts(text: str, words: Sequence[tuple[int, int]], fits: Callable[[str], bool]) -> Iterator[tuple[int, int]]:
    start, stop = words[0][0], words[-1][1]
    if len(words) == 1 or fits(text[start:stop]):
        yield start, stop
    else:
        middle = len(words) // 2
        yield from _parts(text, words[:middle], fits)
        yield from _parts(text, words[middle:], fits)


def read_documents(path: Path, *, id_column: str = "id", text_column: str = "text") -> list[Document]:
    """The documents of a CSV file, whose other columns are their metadata, or of a folder: a text file is a document
    there, and its path in the folder its id. Files are in UTF-8; those of a folder end in .txt or .md.

    Raises `DataError` naming file and row, never a text.
    """
    if path.is_dir():
        return _of_folder(path)
    if id_column == text_column:
        raise DataError(f"{path}: ids and texts can't both be in column {id_column!r}; name another for the ids")
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
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".txt", ".md") and p.is_file())
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
