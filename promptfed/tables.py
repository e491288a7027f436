"""Reading CSV files. An error names file, row and column, and never a text."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from promptfed.errors import DataError

# Column names that an error may show: any other name may be a text, in a file that has no header.
_USUAL_COLUMNS = ("client", "text", "label", "id")


def records(path: Path, wanted: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(row number, record) of every row of a file in UTF-8, gzipped if it ends in .gz; the header is row 1.

    Raises `DataError` for a file that is none, lacks a column of ``wanted``, or has no rows.
    """
    try:
        packed = path.read_bytes()
        text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8-sig")
        lines, is_closed = _parse(text)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise DataError(f"{path}: not a whole gzip file; it is damaged or cut off") from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise DataError(f"{path}: can't be read ({why})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error})") from None
    if not text.strip():
        raise DataError(f"{path}: empty file; expected a header with {', '.join(wanted)}")
    header = [name.strip() for name in lines[0]]
    for column in wanted:
        if header.count(column) != 1:
            what = "no column" if column not in header else f"{header.count(column)} columns"
            raise DataError(f"{path}: {what} {column!r} in the header, {_describe(header, column, wanted)}")
    if not is_closed:
        raise DataError(f"{path}, row {len(lines)}: a quote is opened and never closed")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        if len(line) != len(header):
            raise DataError(f"{path}, row {number}: {len(line)} fields; the header has {len(header)}")
        rows.append((number, dict(zip(header, line, strict=True))))
    if not rows:
        raise DataError(f"{path}: a header but no rows")
    return rows


def _parse(text: str) -> tuple[list[list[str]], bool]:
    """The rows of a CSV text, however long a field, and whether every quote is closed.

    A row put after the last one tells: an open quote swallows it.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 2))
    lines = list(csv.reader(io.StringIO(text.rstrip("\r\n") + "\n.", newline="")))
    is_closed = lines[-1] == ["."]
    return lines[: len(lines) - is_closed], is_closed


def _describe(header: Sequence[str], column: str, wanted: Sequence[str]) -> str:
    """What may be said of a header that lacks ``column``: it may be a client's row, in a file without a header."""
    known = {name.lower() for name in (*wanted, *_USUAL_COLUMNS, *get_close_matches(column, header, cutoff=0.8))}
    shown = [name for name in dict.fromkeys(header) if name.lower() in known]
    size = f"which has {len(header)} column{'s' * (len(header) > 1)}"
    return f"{size}, among them {', '.join(shown)}" if shown else f"{size}; is the first row a header?"
