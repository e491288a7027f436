"""Answers kept in an SQLite file that many runs and processes may share, so that nothing is paid for twice.

A row holds a key, the model's ``fm_id``, the time of writing and the answer as JSON. Neither prompts nor texts are
written for label requests; what a `TextRequest` made the model write is stored, since it is the answer.

The key is an HMAC of `request_key` under a random secret that lies in the file. So two caches can't be compared row by
row, nor looked up in a table made beforehand. It does not stop who holds the file, and so its secret, from testing a
text (with its prompt) that they guess. A secret kept elsewhere would not stop them either where they can run the model:
the log-probabilities are a fingerprint of the text too. The file is as private as the texts are: it has mode 0600, and
`purge` takes answers out of it. Blocks that the disk or a backup keeps are out of reach.

An engine whose numbers move with the batch (the embedded one, in the third digit) gives other numbers for what is
missing from a cache than it would without one: a run with a half-filled cache repeats another to that precision only.

SQLite's write-ahead log needs a local disk with hard links: no network share. Every use opens the file and closes it
again, so threads, event loops and forked processes share nothing but the file.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import logging
import math
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from promptfed.errors import DataError
from promptfed.fm.base import BaseFM, WrappedFM
from promptfed.fm.journal import request_key
from promptfed.types import FMRequest, FMResponse

APPLICATION_ID = 0x70664643  # "pfFC", in the header of the file
SCHEMA_VERSION = 1
# How long to wait for another process: a purge of a large cache takes seconds.
BUSY_S = 30.0
# Keys in one query. Old builds of SQLite take 999 variables.
CHUNK = 900

log = logging.getLogger("promptfed.cache")

_RESPONSE = TypeAdapter(FMResponse)
_DAMAGED = "damaged, or no promptfed cache; it was left as it is. Name another file, or delete this if it was a cache"
_TROUBLE = {
    sqlite3.SQLITE_BUSY: "the cache is held by another process; try again when that is done",
    sqlite3.SQLITE_PROTOCOL: "the cache can't be locked; it needs a disk of this machine, not a network share",
    sqlite3.SQLITE_FULL: "no room for the cache on this disk; make room, or do without the cache",
    sqlite3.SQLITE_IOERR: "the cache can't be read or written; see that the disk is neither full nor failing",
    sqlite3.SQLITE_READONLY: "the cache can't be written; make the file and its folder writable",
    sqlite3.SQLITE_CANTOPEN: "the cache can't be opened; make the file and its folder readable and writable",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a cache holds: answers by ``fm_id``, bytes on disk, and when the oldest and newest were written, in seconds
    since 1970 (None where there are none)."""

    answers: dict[str, int]
    n_bytes: int
    oldest: float | None
    newest: float | None


class CachedFM(WrappedFM):
    """Answers from the cache at ``path`` where it can; asks ``inner`` for the rest, each request once, and keeps that.

    What was remembered costs no tokens and no money and says ``from_cache``; it is an FM call all the same, so a budget
    does not depend on what a cache holds. Failures and numbers that are not finite are never kept.

    What one `complete` brought is written at once, or not at all. If that fails, the answers are returned (they are
    paid for), a warning is logged, and the next `complete` tries again before it asks anything: it raises `DataError`
    if it fails too. Raises `DataError` for a file that is not a cache of this version or can't be written.
    """

    def __init__(self, inner: BaseFM, path: Path) -> None:
        super().__init__(inner)
        self._path = path
        self._lock = threading.Lock()
        self._unwritten: dict[str, FMResponse] = {}
        with self._opened() as connection:
            # Removes nothing, and fails where nothing can be written: here, before a call is paid for.
            connection.execute("DELETE FROM answers WHERE key IS NULL")

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        keys = [request_key(self.fm_id, r) for r in requests]
        known = await asyncio.to_thread(self._find, keys)
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in known}
        fresh: dict[str, FMResponse] = {}
        if missing:
            fresh = dict(zip(missing, await self._inner.complete(list(missing.values())), strict=True))
            await asyncio.to_thread(self._keep, fresh)
        remembered = {key: _remembered(answer) for key, answer in (known | fresh).items()}
        return [fresh.pop(key, remembered[key]) for key in keys]

    def _find(self, keys: Iterable[str]) -> dict[str, FMResponse]:
        with self._lock, self._opened() as connection:
            self._write(connection)
            return _read(connection, self._path, keys)

    def _keep(self, fresh: Mapping[str, FMResponse]) -> None:
        with self._lock:
            self._unwritten |= {key: answer for key, answer in fresh.items() if _is_whole(answer)}
            try:
                with self._opened() as connection:
                    self._write(connection)
            except DataError as error:
                log.warning("%s. %d answers wait in memory for the next call", error, len(self._unwritten))

    def _write(self, connection: sqlite3.Connection) -> None:
        """Write what waits, in one transaction. An answer that another process has written meanwhile stays."""
        if not self._unwritten:
            return
        secret, now = _secret(connection), time.time()
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT OR IGNORE INTO answers (key, fm, created, answer) VALUES (?, ?, ?, ?)",
            ((_row_key(secret, key), self.fm_id, now, _encode(answer)) for key, answer in self._unwritten.items()),
        )
        connection.execute("COMMIT")
        self._unwritten = {}

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        if not self._path.exists():
            _create(self._path)
        with _opened(self._path) as connection:
            yield connection


def cache_stats(path: Path) -> CacheStats:
    """What the cache at ``path`` holds. Raises `DataError` if there is none of this version."""
    with _opened(path) as connection:
        answers = dict(connection.execute("SELECT fm, count(*) FROM answers GROUP BY fm ORDER BY fm"))
        oldest, newest = connection.execute("SELECT min(created), max(created) FROM answers").fetchone()
    files = [path, path.with_name(path.name + "-wal")]
    n_bytes = sum(file.stat().st_size for file in files if file.exists())
    return CacheStats(answers=answers, n_bytes=n_bytes, oldest=oldest, newest=newest)


def purge(path: Path, *, fm_id: str | None = None, older_than_s: float | None = None) -> int:
    """Remove the answers of model ``fm_id`` (None: of all) written more than ``older_than_s`` seconds ago (None: at any
    time), from the bytes of the file too. The number removed.

    Raises `DataError` if there is no cache of this version, or another process keeps the bytes from being overwritten.
    """
    before = None if older_than_s is None else time.time() - older_than_s
    with _opened(path) as connection:
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA temp_store = MEMORY")  # VACUUM copies what stays: not into a folder for all
        removed = connection.execute(
            "DELETE FROM answers WHERE (:fm IS NULL OR fm = :fm) AND (:before IS NULL OR created < :before)",
            {"fm": fm_id, "before": before},
        ).rowcount
        connection.execute("VACUUM")
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise DataError(
            f"{path}: {removed} answers were removed, but another process uses the cache and their bytes are still in "
            "the file; purge again when that process is done"
        )
    return removed


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for this thread, closed at the end (an open transaction is undone). What SQLite raises becomes a
    `DataError`."""
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    try:
        # The file is opened by SQLite alone: closing it another way would drop the locks that this process holds on it.
        uri = f"{path.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)) as connection:
            _check(connection, path)
            connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the newest answers, never the file
            yield connection
    except sqlite3.DatabaseError as error:
        # Without a code: bytes that are no text, which the message quotes.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        raise DataError(f"{path}: {_TROUBLE.get(code, _DAMAGED)}") from None


def _check(connection: sqlite3.Connection, path: Path) -> None:
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID:
        raise DataError(f"{path}: {_DAMAGED}")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: a cache of schema {version}; this promptfed reads {SCHEMA_VERSION}. It was left as it is. Name "
            "another file, or delete this one: its answers are then asked for again"
        )


def _create(path: Path) -> None:
    """An empty cache, made aside and linked into place: nobody ever finds half of one, nor loses a file to it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".promptfed-cache-") as folder:
            made = Path(folder) / "cache"
            made.touch(mode=0o600)  # SQLite gives its -wal and -shm files the same mode
            with closing(sqlite3.connect(made, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute("CREATE TABLE secret (secret BLOB NOT NULL)")
                connection.execute("INSERT INTO secret VALUES (?)", (secrets.token_bytes(32),))
                connection.execute(
                    "CREATE TABLE answers (key BLOB PRIMARY KEY, fm TEXT NOT NULL, created REAL NOT NULL, "
                    "answer BLOB NOT NULL) WITHOUT ROWID"
                )
            with suppress(FileExistsError):  # another process was faster: its cache is the one
                path.hardlink_to(made)
    except OSError as error:
        raise DataError(
            f"{path}: the cache can't be made ({error.strerror}); name a file in a folder of yours"
        ) from None
    except sqlite3.OperationalError:
        raise DataError(f"{path}: the cache can't be made; see that the disk is not full") from None


def _read(connection: sqlite3.Connection, path: Path, keys: Iterable[str]) -> dict[str, FMResponse]:
    secret = _secret(connection)
    names = {_row_key(secret, key): key for key in keys}
    rows, found = list(names), {}
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        query = f"SELECT key, answer FROM answers WHERE key IN ({','.join('?' * len(chunk))})"  # noqa: S608
        for row, answer in connection.execute(query, chunk):
            try:
                found[names[row]] = _RESPONSE.validate_python(json.loads(answer))
            except ValueError:
                raise DataError(f"{path}: {_DAMAGED}") from None
    return found


def _secret(connection: sqlite3.Connection) -> bytes:
    (secret,) = connection.execute("SELECT secret FROM secret").fetchone()
    return bytes(secret)


def _row_key(secret: bytes, key: str) -> bytes:
    return hmac.digest(secret, key.encode(), "sha256")


def _encode(answer: FMResponse) -> bytes:
    return json.dumps(dataclasses.asdict(answer), allow_nan=False).encode()


def _is_whole(answer: FMResponse) -> bool:
    numbers = (*(answer.logprobs or ()), answer.usd, answer.retry_after_s or 0.0)
    return answer.error is None and not answer.outage and all(map(math.isfinite, numbers))


def _remembered(answer: FMResponse) -> FMResponse:
    return replace(answer, prompt_tokens=0, completion_tokens=0, cached_tokens=0, usd=0.0, from_cache=True)
