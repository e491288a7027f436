"""Answers kept in a file that processes share: asked once, whole after any accident, and gone when purged."""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import DataError
from promptfed.fm import cache
from promptfed.fm.base import BaseFM
from promptfed.fm.cache import APPLICATION_ID, CHUNK, SCHEMA_VERSION, CachedFM, CacheStats, cache_stats, purge
from promptfed.fm.decorators import Metered
from promptfed.fm.journal import request_key
from promptfed.fm.scripted import ScriptedFM
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.support import CountingFM, FailingFM, wait_for

LABEL = LabelRequest(prefix="Text:", text=" private 0", suffix="\nLabel:", labels=(" bad", " good"))
WRITE = TextRequest(prompt="Write:", max_tokens=5, temperature=0.5, top_p=0.9, seed=3)

# A process of its own: BATCHES batches of SIZE requests from START on; it kills itself at the DIE-th answer written.
WRITER = """
import asyncio, os, signal, sys
from pathlib import Path
from promptfed.fm import cache
from promptfed.fm.scripted import ScriptedFM
from promptfed.types import LabelRequest

start, batches, size, die = map(int, sys.argv[2:])
encode, n = cache._encode, 0

def encode_or_die(answer):
    global n
    n += 1
    if n == die:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(answer)

cache._encode = encode_or_die
fm = cache.CachedFM(ScriptedFM(), Path(sys.argv[1]))
for first in range(start, start + batches * size, size):
    texts = [f" private {i}" for i in range(first, first + size)]
    asked = [LabelRequest(prefix="Text:", text=t, suffix="\\nLabel:", labels=(" bad", " good")) for t in texts]
    asyncio.run(fm.complete(asked))
    print(first, flush=True)
"""


class PreparedFM(BaseFM):
    """Gives the answers that it was given, from the first on."""

    capabilities = frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS})

    def __init__(self, *answers: FMResponse, fm_id: str = "prepared@0") -> None:
        self._answers, self._fm_id = answers, fm_id

    @property
    def fm_id(self) -> str:
        return self._fm_id

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return list(self._answers[: len(requests)])


def requests(n: int, start: int = 0) -> list[FMRequest]:
    return [replace(LABEL, text=f" private {i}") for i in range(start, start + n)]


def cached(path: Path) -> tuple[CachedFM, CountingFM]:
    inner = CountingFM(ScriptedFM())
    return CachedFM(inner, path), inner


def filled(path: Path, n: int = 3) -> list[FMResponse]:
    return wait_for(cached(path)[0].complete(requests(n)))


def remembered(answer: FMResponse) -> FMResponse:
    return replace(answer, prompt_tokens=0, completion_tokens=0, cached_tokens=0, usd=0.0, from_cache=True)


def n_answers(path: Path) -> int:
    return sum(cache_stats(path).answers.values())


def sql(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def on_disk(path: Path) -> bytes:
    """All bytes of the cache: the file and what SQLite keeps beside it."""
    return b"".join(p.read_bytes() for p in sorted(path.parent.glob(path.name + "*")))


@contextmanager
def another_process_writes(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def another_process_reads(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM answers").fetchone()
        yield


# ---------------------------------------------------------------- hits


def test_what_was_answered_is_not_asked_again_by_another_run(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "cache.sqlite"
    first, _ = cached(path)
    answers = wait_for(first.complete([LABEL, WRITE]))

    second, inner = cached(path)
    again = wait_for(second.complete([WRITE, LABEL]))

    assert answers == wait_for(ScriptedFM().complete([LABEL, WRITE]))
    assert again == [remembered(answers[1]), remembered(answers[0])]
    assert inner.n_calls == 0
    assert second.fm_id == ScriptedFM().fm_id


def test_a_hit_is_a_call_in_the_books_that_costs_nothing(tmp_path: Path) -> None:
    paid = FMResponse(text="ok", prompt_tokens=7, completion_tokens=2, cached_tokens=3, usd=0.5, truncated=True)
    fm = Metered(CachedFM(PreparedFM(paid), tmp_path / "c.sqlite"))

    first = wait_for(fm.complete([WRITE]))
    again = wait_for(fm.complete([WRITE]))

    assert first == [paid]
    assert again == [FMResponse(text="ok", truncated=True, from_cache=True)]
    assert (fm.usage.fm_calls, fm.usage.truncated_calls) == (2, 2)
    assert (fm.usage.prompt_tokens, fm.usage.completion_tokens, fm.usage.cached_tokens) == (7, 2, 3)
    assert fm.usage.usd == 0.5


def test_only_what_is_missing_is_asked_and_twins_are_asked_and_paid_once(tmp_path: Path) -> None:
    fm, inner = cached(tmp_path / "c.sqlite")
    wait_for(fm.complete(requests(2)))

    answers = wait_for(fm.complete([*requests(3), *requests(3)]))

    assert inner.batches == [2, 1]
    assert inner.requests[2:] == requests(3)[2:]
    assert [a.from_cache for a in answers] == [True, True, False, True, True, True]
    assert [a.logprobs for a in answers[:3]] == [a.logprobs for a in answers[3:]]
    assert answers[5] == remembered(answers[2])


def test_another_model_does_not_find_the_answers_of_this_one(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    filled(path, 1)
    other = CountingFM(ScriptedFM("other"))

    wait_for(CachedFM(other, path).complete(requests(1)))

    assert other.n_calls == 1
    assert cache_stats(path).answers == {"scripted:other@0": 1, "scripted:overlap@0": 1}


def test_a_batch_of_more_than_one_query(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    n = 2 * CHUNK + 1
    answers = filled(path, n)

    fm, inner = cached(path)
    again = wait_for(fm.complete(requests(n)))

    assert again == [remembered(a) for a in answers]
    assert inner.n_calls == 0


def test_what_another_process_has_answered_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"

    class Slow(ScriptedFM):
        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            await CachedFM(PreparedFM(FMResponse(text="theirs"), fm_id=self.fm_id), path).complete(requests)
            return [FMResponse(text="mine")]

    fm = CachedFM(Slow(), path)

    assert wait_for(fm.complete([WRITE])) == [FMResponse(text="mine")]
    assert wait_for(fm.complete([WRITE])) == [FMResponse(text="theirs", from_cache=True)]


finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**40)
whole_answers = st.builds(
    FMResponse,
    logprobs=st.none() | st.lists(finite, max_size=4).map(tuple),
    label_tokens=st.none() | st.lists(counts, max_size=4).map(tuple),
    censored=st.none() | st.lists(st.booleans(), max_size=4).map(tuple),
    text=st.none() | st.text(st.characters()),
    retry_after_s=st.none() | finite,
    prompt_tokens=counts,
    completion_tokens=counts,
    cached_tokens=counts,
    usd=finite,
    truncated=st.booleans(),
)


@given(answers=st.lists(whole_answers, min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_an_answer_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, answers: list[FMResponse]) -> None:
    path = tmp_path_factory.mktemp("c") / "c.sqlite"
    asked = requests(len(answers))

    assert wait_for(CachedFM(PreparedFM(*answers), path).complete(asked)) == answers

    again = wait_for(CachedFM(PreparedFM(), path).complete(asked))
    assert again == [remembered(a) for a in answers]
    with closing(sqlite3.connect(path)) as connection:  # with what it had cost
        stored = [cache._RESPONSE.validate_json(row) for (row,) in connection.execute("SELECT answer FROM answers")]
    assert sorted(stored, key=repr) == sorted(answers, key=repr)


# ---------------------------------------------------------------- what is never kept


@pytest.mark.parametrize(
    "answer",
    [
        FMResponse(error="refused"),
        FMResponse(error="HTTP 503", outage=True),
        FMResponse(outage=True),
        FMResponse(logprobs=(-1.0, float("-inf"))),
        FMResponse(logprobs=(float("nan"), -1.0)),
        FMResponse(text="ok", usd=float("nan")),
        FMResponse(text="ok", retry_after_s=float("inf")),
    ],
)
def test_failures_and_numbers_that_are_not_finite_are_returned_and_not_kept(tmp_path: Path, answer: FMResponse) -> None:
    path = tmp_path / "c.sqlite"
    good = FMResponse(logprobs=(-1.0, -2.0))
    inner = CountingFM(PreparedFM(answer, good))
    fm = CachedFM(inner, path)

    answers = wait_for(fm.complete(requests(2)))

    assert repr(answers) == repr([answer, good])  # NaN is not equal to itself
    assert n_answers(path) == 1
    wait_for(fm.complete(requests(2)))
    assert inner.batches == [2, 1]


def test_a_failure_is_asked_once_in_a_batch_too(tmp_path: Path) -> None:
    inner = CountingFM(FailingFM())

    answers = wait_for(CachedFM(inner, tmp_path / "c.sqlite").complete([LABEL, LABEL]))

    assert [a.error for a in answers] == ["refused", "refused"]
    assert inner.batches == [1]


def test_what_the_model_raises_is_raised_and_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"

    with pytest.raises(ZeroDivisionError):
        wait_for(CachedFM(FailingFM(ZeroDivisionError()), path).complete([LABEL]))

    assert n_answers(path) == 0


# ---------------------------------------------------------------- privacy


def test_neither_texts_nor_prompts_are_in_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    canaries = ("CANARYtext", "CANARYprefix", "CANARYsuffix", "CANARYlabel", "CANARYprompt", "CANARYstop")
    text, prefix, suffix, label, prompt, stop = canaries
    asked: list[FMRequest] = [
        LabelRequest(prefix=prefix, text=text, suffix=suffix, labels=(label, "x")),
        TextRequest(prompt=prompt, max_tokens=3, stop=(stop,)),
    ]
    fm = CachedFM(PreparedFM(FMResponse(logprobs=(-1.0, -2.0)), FMResponse(text="WRITTENanswer")), path)

    with another_process_reads(path):  # so that the log stays
        wait_for(fm.complete(asked))
        log, seen = path.with_name("c.sqlite-wal").read_bytes(), on_disk(path)

    # What is an answer is there to be found, in the log first and then in the file.
    assert b"WRITTENanswer" in log
    assert b"WRITTENanswer" in path.read_bytes()
    for bytes_ in (seen, on_disk(path)):
        assert not [c for c in canaries if c.encode() in bytes_]


def test_keys_are_not_the_bare_hashes_and_differ_between_files(tmp_path: Path) -> None:
    keys = []
    for name in ("a", "b"):
        filled(tmp_path / name, 1)
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            keys += connection.execute("SELECT key FROM answers").fetchone()
    bare = request_key(ScriptedFM().fm_id, LABEL)

    assert keys[0] != keys[1]
    assert bare.encode() not in on_disk(tmp_path / "a")
    assert bytes.fromhex(bare) not in on_disk(tmp_path / "a")


def test_only_the_owner_may_read_the_file_and_what_is_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    fm, _ = cached(path)

    with another_process_reads(path):
        wait_for(fm.complete([LABEL]))
        modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}

    assert modes == {"c.sqlite": 0o600, "c.sqlite-wal": 0o600, "c.sqlite-shm": 0o600}
    assert [p.name for p in tmp_path.iterdir()] == ["c.sqlite"]


# ---------------------------------------------------------------- many at once


def start_writer(path: Path, start: int, batches: int, size: int, die: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), *map(str, (start, batches, size, die))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"

    writers = [start_writer(path, start, batches=40, size=5) for start in (0, 100)]  # 0 to 199 and 100 to 299
    for writer in writers:
        writer.communicate()

    assert [writer.returncode for writer in writers] == [0, 0]
    assert n_answers(path) == 300
    fm, inner = cached(path)
    answers = wait_for(fm.complete(requests(300)))
    assert inner.n_calls == 0
    assert answers == [remembered(a) for a in wait_for(ScriptedFM().complete(requests(300)))]
    assert [p.name for p in tmp_path.iterdir()] == ["c.sqlite"]


def test_the_slower_of_two_that_make_the_file_takes_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    filled(path, 3)
    before = path.read_bytes()

    cache._create(path)

    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.sqlite"]


# The second transaction of the second case is larger than what SQLite holds in memory.
@pytest.mark.parametrize(("size", "die", "kept"), [(20, 105, 100), (12_000, 23_000, 12_000)])
def test_a_kill_in_the_middle_of_writing_leaves_whole_batches(tmp_path: Path, size: int, die: int, kept: int) -> None:
    path = tmp_path / "c.sqlite"

    writer = start_writer(path, start=0, batches=6, size=size, die=die)
    writer.communicate()

    assert writer.returncode == -9
    assert n_answers(path) == kept
    fm, inner = cached(path)
    asked = requests(20, start=kept - 10)
    assert [a.logprobs for a in wait_for(fm.complete(asked))] == [
        a.logprobs for a in wait_for(ScriptedFM().complete(asked))
    ]
    assert inner.requests == asked[10:]


def test_a_kill_at_any_time_keeps_what_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    writer = start_writer(path, start=0, batches=10_000, size=20)
    assert writer.stdout is not None

    for _ in range(5):
        last = int(writer.stdout.readline())
    writer.kill()
    writer.communicate()

    n = n_answers(path)
    assert n >= last + 20 == 100
    assert n % 20 == 0
    fm, inner = cached(path)
    assert wait_for(fm.complete(requests(n))) == [remembered(a) for a in wait_for(ScriptedFM().complete(requests(n)))]
    assert inner.n_calls == 0


def test_threads_with_loops_of_their_own_share_one_object(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    fm, _ = cached(path)
    wrong: list[int] = []

    def work(k: int) -> None:
        asked = requests(30, start=10 * k)
        for _ in range(3):
            said = [a.logprobs for a in wait_for(fm.complete(asked))]
            if said != [a.logprobs for a in wait_for(ScriptedFM().complete(asked))]:
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert n_answers(path) == 60


# ---------------------------------------------------------------- files that can't be used


def foreign_database(path: Path) -> None:
    sql(path, "CREATE TABLE answers (key, answer)")


def another_schema(path: Path) -> None:
    filled(path)
    sql(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def damaged_pages(path: Path) -> None:
    filled(path, 300)
    with path.open("r+b") as file:
        file.seek(4096)  # the header stays
        file.write(b"\xa5" * (path.stat().st_size - 4096))


def damaged_answer(path: Path) -> None:
    filled(path)
    sql(path, 'UPDATE answers SET answer = CAST(\'{"text": "secret\' AS BLOB)')


def cut_short(path: Path) -> None:
    filled(path, 300)
    os.truncate(path, 6000)


def no_tables(path: Path) -> None:
    sql(path, f"PRAGMA application_id = {APPLICATION_ID}")
    sql(path, f"PRAGMA user_version = {SCHEMA_VERSION}")


NO_CACHE = r"c\.sqlite: damaged, or no promptfed cache; it was left as it is\. Name another file"
OTHER = r"c\.sqlite: a cache of schema 2; this promptfed reads 1\. It was left as it is\. Name another file, or delete"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("a,b\n1,2\n"), NO_CACHE),
        (lambda path: path.write_bytes(b""), NO_CACHE),
        (foreign_database, NO_CACHE),
        (another_schema, OTHER),
        (damaged_pages, NO_CACHE),
        (damaged_answer, NO_CACHE),
        (cut_short, NO_CACHE),
        (no_tables, NO_CACHE),
    ],
    ids=["text", "empty", "foreign", "schema", "pages", "answer", "cut", "no tables"],
)
def test_a_file_that_is_no_cache_is_named_and_left_as_it_is(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "c.sqlite"
    make(path)  # type: ignore[operator]
    before = path.read_bytes()
    inner = CountingFM(ScriptedFM())

    with pytest.raises(DataError, match=message) as caught:
        wait_for(CachedFM(inner, path).complete(requests(3)))

    assert "secret" not in str(caught.value)
    assert inner.n_calls == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", [foreign_database, another_schema])
def test_neither_purge_nor_stats_touch_what_is_no_cache(tmp_path: Path, make: object) -> None:
    path = tmp_path / "c.sqlite"
    make(path)  # type: ignore[operator]
    before = path.read_bytes()

    for use in (purge, cache_stats):
        with pytest.raises(DataError, match=r"c\.sqlite: "):
            use(path)
    assert path.read_bytes() == before


def test_what_is_not_there_is_not_made_by_looking(tmp_path: Path) -> None:
    for use in (purge, cache_stats):
        with pytest.raises(DataError, match=r"none\.sqlite: there is no such file"):
            use(tmp_path / "none.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the cache can't be opened"):
        cached(tmp_path)


def test_a_place_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match=r"file/c\.sqlite: the cache can't be made \(.+\); name a file in a folder"):
        cached(tmp_path / "file" / "c.sqlite")


@contextmanager
def somebody_else() -> Iterator[Path]:
    """A folder of a user who is not the superuser, to whom permissions mean nothing, and that user's rights."""
    folder = Path(tempfile.mkdtemp())
    me = os.geteuid()
    try:
        if me == 0:
            user = pwd.getpwnam("nobody").pw_uid
            os.chown(folder, user, -1)
            os.seteuid(user)
        yield folder
    finally:
        os.seteuid(me)
        folder.chmod(0o700)
        shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o400, 0o500])
def test_a_cache_that_can_not_be_written_is_an_error_before_a_call_is_made(mode: int) -> None:
    with somebody_else() as folder:
        path = folder / "c.sqlite"
        filled(path)
        (path if mode == 0o400 else folder).chmod(mode)

        with pytest.raises(DataError, match=r"c\.sqlite: the cache can't be (written|opened); make the file and its"):
            cached(path)


# ---------------------------------------------------------------- writing fails


def test_answers_that_could_not_be_written_are_returned_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "BUSY_S", 0.05)
    path = tmp_path / "c.sqlite"
    fm, inner = cached(path)

    with another_process_writes(path):
        answers = wait_for(fm.complete(requests(2)))
        with pytest.raises(DataError, match=r"c\.sqlite: the cache is held by another process"):
            wait_for(fm.complete(requests(3)))

    assert answers == wait_for(ScriptedFM().complete(requests(2)))
    assert inner.batches == [2]  # the second call was not made
    assert "c.sqlite: the cache is held" in caplog.text
    assert "2 answers wait in memory" in caplog.text
    assert n_answers(path) == 0
    assert wait_for(fm.complete(requests(3)))[:2] == [remembered(a) for a in answers]
    assert inner.batches == [2, 1]
    assert n_answers(path) == 3


def test_a_disk_without_room_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "c.sqlite"
    fm, inner = cached(path)
    wait_for(fm.complete(requests(5)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # no file may grow beyond
    try:
        answers = wait_for(fm.complete(requests(600, start=5)))
        with pytest.raises(DataError, match=r"c\.sqlite: the cache can't be read or written; see that the disk"):
            wait_for(fm.complete(requests(1, start=1000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert answers == wait_for(ScriptedFM().complete(requests(600, start=5)))
    assert "600 answers wait in memory" in caplog.text
    assert n_answers(path) == 5
    assert all(a.from_cache for a in wait_for(fm.complete(requests(605))))
    assert inner.batches == [5, 600]
    assert n_answers(path) == 605


# ---------------------------------------------------------------- stats and purge


def two_models(path: Path) -> None:
    """Two answers of a@1 written at second 1000 and one of b@1 at second 2000."""
    written = [FMResponse(text=f"ANSWER{i}") for i in range(3)]
    wait_for(CachedFM(PreparedFM(*written[:2], fm_id="a@1"), path).complete(requests(2)))
    wait_for(CachedFM(PreparedFM(written[2], fm_id="b@1"), path).complete(requests(1)))
    sql(path, "UPDATE answers SET created = CASE fm WHEN 'a@1' THEN 1000 ELSE 2000 END")


def test_stats_count_answers_by_model(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    two_models(path)

    assert cache_stats(path) == CacheStats(
        answers={"a@1": 2, "b@1": 1}, n_bytes=path.stat().st_size, oldest=1000, newest=2000
    )


def test_stats_of_an_empty_cache_and_the_time_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.sqlite"
    fm, _ = cached(path)
    empty = cache_stats(path)
    monkeypatch.setattr("promptfed.fm.cache.time.time", lambda: 1234.5)

    wait_for(fm.complete([LABEL]))

    assert (empty.answers, empty.oldest, empty.newest) == ({}, None, None)
    assert (cache_stats(path).oldest, cache_stats(path).newest) == (1234.5, 1234.5)


@pytest.mark.parametrize(
    ("options", "removed", "left"),
    [
        ({}, 3, set()),
        ({"fm_id": "a@1"}, 2, {2}),
        ({"fm_id": "c@1"}, 0, {0, 1, 2}),
        ({"older_than_s": 1500.0}, 2, {2}),
        ({"older_than_s": 2500.0}, 0, {0, 1, 2}),
        ({"fm_id": "b@1", "older_than_s": 1500.0}, 0, {0, 1, 2}),
        ({"fm_id": "b@1", "older_than_s": 500.0}, 1, {0, 1}),
    ],
)
def test_purge_removes_the_bytes_of_what_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], removed: int, left: set[int]
) -> None:
    path = tmp_path / "c.sqlite"
    two_models(path)
    assert all(f"ANSWER{i}".encode() in on_disk(path) for i in range(3))
    monkeypatch.setattr("promptfed.fm.cache.time.time", lambda: 3000.0)

    assert purge(path, **options) == removed  # type: ignore[arg-type]

    assert {i for i in range(3) if f"ANSWER{i}".encode() in on_disk(path)} == left
    assert n_answers(path) == len(left)
    fm = CountingFM(PreparedFM(FMResponse(text="new"), FMResponse(text="new"), fm_id="a@1"))
    wait_for(CachedFM(fm, path).complete(requests(2)))
    assert fm.n_calls == 2 - len(left & {0, 1})


def test_purge_makes_the_file_small(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    filled(path, 500)
    before = path.stat().st_size

    purge(path)

    assert before > 100_000
    assert path.stat().st_size < 20_000


def test_a_purge_that_can_not_reach_all_bytes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BUSY_S", 0.05)
    path = tmp_path / "c.sqlite"
    two_models(path)

    with another_process_reads(path), pytest.raises(DataError, match="3 answers were removed, but another process"):
        purge(path)

    assert purge(path) == 0
    assert b"ANSWER" not in on_disk(path)
