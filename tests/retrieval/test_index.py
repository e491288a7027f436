"""A local index: documents in, passages out, files that survive a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from promptfed.errors import ConfigError, DataError, PromptfedError
from promptfed.types import FloatArray, SearchMode
from retrieval import index as index_module
from retrieval import vectors
from retrieval.documents import Document
from retrieval.index import Added, LocalIndex
from retrieval.vectors import Kind
from tests.support import WordEncoder

ROOT = Path(__file__).parents[2]
KINDS = get_args(Kind)
LEAVE = Document(doc_id="leave", text="Staff have thirty days of leave a year.", metadata={"page": 3})
PAY = Document(doc_id="pay", text="Wages are paid on the last day of a month.")
FIRE = Document(doc_id="fire", text="In case of fire use the stairs, not the lift.")
ALL = [LEAVE, PAY, FIRE]


def made(documents: Sequence[Document] = ALL, **options: object) -> LocalIndex:
    index = LocalIndex(WordEncoder(), **options)  # type: ignore[arg-type]
    index.add(documents)
    return index


@pytest.mark.parametrize("mode", get_args(SearchMode))
@pytest.mark.parametrize("kind", KINDS)
def test_a_question_finds_its_document(kind: Kind, mode: SearchMode) -> None:
    index = made(kind=kind)

    leave, fire = index.search(["days of leave", "stairs or lift"], 2, mode)

    assert leave[0].doc_id == "leave"
    assert leave[0].text == LEAVE.text
    assert leave[0].metadata == {"page": 3}
    assert fire[0].doc_id == "fire"
    assert [h.score for h in leave] == sorted((h.score for h in leave), reverse=True)


def test_a_hybrid_ranks_by_the_reciprocal_ranks_of_both() -> None:
    index = made()
    query = "the last day of leave"
    dense = [hit.doc_id for hit in index.search([query], 3, "dense")[0]]
    lexical = [hit.doc_id for hit in index.search([query], 3, "lexical")[0]]

    found = {hit.doc_id: hit.score for hit in index.search([query], 3, "hybrid")[0]}

    want = {i: sum(1 / (60 + ranks.index(i) + 1) for ranks in (dense, lexical) if i in ranks) for i in found}
    assert found == pytest.approx(want)


def test_a_long_document_is_found_by_each_of_its_passages() -> None:
    text = " ".join(f"word{i}" for i in range(25))
    index = made([Document(doc_id="long", text=text)], passage_words=10, overlap_words=2)

    (hits,) = index.search(["word24"], 1, "lexical")

    assert index.n_passages == 3
    assert len(index) == 1
    assert (hits[0].doc_id, hits[0].passage) == ("long", 2)
    assert hits[0].text == " ".join(f"word{i}" for i in range(16, 25))
    assert made([Document(doc_id="long", text=text)], passage_words=None).n_passages == 1


@pytest.mark.parametrize("saved", [False, True])
def test_a_document_comes_back_as_it_was_added(tmp_path: Path, saved: bool) -> None:
    odd = Document(
        doc_id="odd",
        text=" Größe\u00a0文字 😀\n\nand more, much more of it ",
        metadata={"a": [1, None], "n": {"1": {2: "x"}}},
    )
    index = made([*ALL, odd], passage_words=3, overlap_words=1)
    if saved:
        index.save(tmp_path)
        index = LocalIndex.open(tmp_path, WordEncoder())

    assert index.document("odd") == odd
    assert index.document("leave") == LEAVE
    assert index.passages("odd") == ["Größe\u00a0文字 😀", "😀\n\nand more,", "more, much more", "more of it"]


def test_half_a_character_becomes_a_question_mark() -> None:
    index = made([Document(doc_id="half", text="one \ud83d two")])

    assert index.passages("half") == ["one ? two"]


def test_adding_again_changes_nothing_and_another_text_replaces() -> None:
    index = made()
    before = index.doc_ids

    assert index.add(ALL) == Added(unchanged=3)
    assert index.doc_ids == before
    assert index.add([Document(doc_id="pay", text="Wages are paid weekly.")]) == Added(replaced=1)
    assert index.n_passages == 3
    assert index.passages("pay") == ["Wages are paid weekly."]
    assert index.add([Document(doc_id="new", text="New."), Document(doc_id="void", text=" ")]) == Added(new=1, empty=1)
    assert "void" not in index


def test_a_document_that_lost_its_text_is_gone() -> None:
    index = made()

    assert index.add([Document(doc_id="pay", text="")]) == Added(empty=1, removed=1)

    assert "pay" not in index
    assert len(index) == 2


@pytest.mark.parametrize("mode", get_args(SearchMode))
@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_document_is_not_found(kind: Kind, mode: SearchMode) -> None:
    index = made(kind=kind)
    index.search(["leave"], 1, mode)  # an index of words is built, and has to be built anew

    assert index.delete(["leave", "leave", "unknown"]) == 1

    assert "leave" not in {hit.doc_id for hit in index.search([LEAVE.text], 3, mode)[0]}
    assert index.delete(["leave"]) == 0


def test_a_failing_encoder_leaves_the_index_as_it_was() -> None:
    class Failing(WordEncoder):
        def encode(self, texts: Sequence[str]) -> FloatArray:
            if any("poison" in text for text in texts):
                raise RuntimeError
            return super().encode(texts)

    index = LocalIndex(Failing())
    index.add(ALL)

    with pytest.raises(RuntimeError):
        index.add([Document(doc_id="pay", text="poison")])

    assert index.passages("pay") == [PAY.text]
    assert index.search([PAY.text], 1)[0][0].doc_id == "pay"


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_an_index_is_opened_as_it_was_saved(tmp_path: Path, kind: Kind | None) -> None:
    index = made(kind=kind)
    index.save(tmp_path / "index")

    back = LocalIndex.open(tmp_path / "index", WordEncoder())

    for mode in get_args(SearchMode):
        assert back.search(["leave and pay"], 3, mode) == index.search(["leave and pay"], 3, mode)
    assert back.doc_ids == index.doc_ids
    assert back.kind == index.kind
    assert back.add(ALL) == Added(unchanged=3)


def test_an_opened_index_can_be_changed_and_saved_again(tmp_path: Path) -> None:
    made().save(tmp_path / "index")
    index = LocalIndex.open(tmp_path / "index", WordEncoder())

    index.delete(["fire"])
    index.add([Document(doc_id="lunch", text="Lunch is at noon.")])
    index.save(tmp_path / "index")

    back = LocalIndex.open(tmp_path / "index", WordEncoder())
    assert back.doc_ids == ("leave", "pay", "lunch")
    assert back.search(["lunch at noon"], 1)[0][0].doc_id == "lunch"
    assert "fire" not in {hit.doc_id for hit in back.search([FIRE.text], 3)[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_text_and_its_vector_are_gone_from_the_disk(tmp_path: Path, kind: Kind) -> None:
    index = made(kind=kind)
    index.save(tmp_path / "index")
    vector = WordEncoder().encode([FIRE.text])[0].astype(np.float32).tobytes()
    assert holds(tmp_path, FIRE.text.encode())
    assert holds(tmp_path, vector)

    index.delete(["fire"])
    index.save(tmp_path / "index")

    assert not holds(tmp_path, FIRE.text.encode())
    assert not holds(tmp_path, vector)
    assert holds(tmp_path, PAY.text.encode())


def generation(folder: Path) -> Path:
    (found,) = folder.glob("generation-*")
    return found


def holds(folder: Path, content: bytes) -> bool:
    return any(content in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_index_killed_while_it_is_saved_opens_as_before_or_after(tmp_path: Path) -> None:
    """A child is killed at each of its steps on the file system in turn; see `tests.killable_index`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killable_index", str(tmp_path / "index")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )

    lines = [line.split(" ") for line in done.stdout.splitlines()]
    states = [line[0] for line in lines]
    assert set(states) == {"before", "after"}
    assert states == sorted(states, reverse=True)  # once it counts, it counts
    assert states.count("before") > 5
    assert {line[1] for line in lines} == {"after"}
    assert all(len(line[2].split(",")) == 3 for line in lines)  # current, lock, and one generation


def test_who_saved_second_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    made().save(tmp_path / "index")
    mine, others = (LocalIndex.open(tmp_path / "index", WordEncoder()) for _ in range(2))
    others.delete(["fire"])
    others.save(tmp_path / "index")

    with pytest.raises(DataError, match="open it anew"):
        mine.save(tmp_path / "index")
    with pytest.raises(DataError, match="changed since it was opened"):
        mine.delete(["pay"])
    with pytest.raises(DataError, match="an index that this one did not grow from"):
        made().save(tmp_path / "index")
    with pytest.raises(DataError, match="changed since it was opened"):
        mine.add([Document(doc_id="new", text="New.")])
    assert "new" not in mine

    assert mine.search(["leave"], 1)[0][0].doc_id == "leave"  # it goes on with the files that it has open
    assert LocalIndex.open(tmp_path / "index", WordEncoder()).doc_ids == ("leave", "pay")


def test_an_index_does_not_take_the_place_of_another(tmp_path: Path) -> None:
    mine, other = made(), made([PAY])
    mine.save(tmp_path / "mine")
    other.save(tmp_path / "other")

    with pytest.raises(DataError, match="an index that this one did not grow from"):
        mine.save(tmp_path / "other")
    mine.save(tmp_path / "copy")

    assert LocalIndex.open(tmp_path / "other", WordEncoder()).doc_ids == ("pay",)
    assert LocalIndex.open(tmp_path / "copy", WordEncoder()).doc_ids == mine.doc_ids


def test_generations_without_word_which_one_counts_are_left_alone(tmp_path: Path) -> None:
    made().save(tmp_path)
    (tmp_path / "current").unlink()

    with pytest.raises(DataError, match="no file 'current' that says whether it counts"):
        made([PAY]).save(tmp_path)
    (tmp_path / "current").write_text(generation(tmp_path).name)

    assert LocalIndex.open(tmp_path, WordEncoder()).doc_ids == ("leave", "pay", "fire")


def test_threads_search_while_another_adds_and_deletes(tmp_path: Path) -> None:
    index = made()
    ends = time.monotonic() + 1.0

    def change() -> None:
        i = 0
        while time.monotonic() < ends:
            i += 1
            index.add([Document(doc_id=f"more{i % 7}", text=f"more of leave {i}")])
            index.delete([f"more{(i + 3) % 7}"])

    def search(mode: SearchMode) -> int:
        n = 0
        while time.monotonic() < ends:
            n += len(index.search(["leave", "more"], 5, mode)[0])
        return n

    with ThreadPoolExecutor() as pool:
        running = [pool.submit(search, mode) for mode in get_args(SearchMode)]
        pool.submit(change).result()
        assert all(each.result() > 0 for each in running)


def test_an_index_opened_again_and_again_while_it_is_saved_is_always_whole(tmp_path: Path) -> None:
    index = made()
    index.save(tmp_path)
    ends = time.monotonic() + 1.0

    def save() -> int:
        n = 0
        while time.monotonic() < ends:
            index.add([Document(doc_id="pay", text=f"Pay number {n}.")])
            index.save(tmp_path)
            n += 1
        return n

    with ThreadPoolExecutor() as pool:
        saving = pool.submit(save)
        while time.monotonic() < ends:
            assert len(LocalIndex.open(tmp_path, WordEncoder())) == 3
        assert saving.result() > 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_mapped_and_not_read(tmp_path: Path, kind: Kind) -> None:
    made(kind=kind).save(tmp_path)

    index = LocalIndex.open(tmp_path, WordEncoder())

    assert str(generation(tmp_path) / "vectors.faiss") in Path("/proc/self/maps").read_text()
    assert index.search(["leave"], 1)[0][0].doc_id == "leave"


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    class Other(WordEncoder):
        encoder_id = "other"

    made().save(tmp_path / "index")

    with pytest.raises(ConfigError, match="made with encoder 'words-64', opened with 'other'"):
        LocalIndex.open(tmp_path / "index", Other())


def test_a_vector_of_another_dimension_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 3 numbers, those of this index 64"):
        made().search_vectors(np.ones((1, 3)), 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "current").unlink(), "lost its file 'current'"),
        (lambda f: (f / "current").write_text("generation-999999"), "names no generation"),
        (lambda f: (f / "current").write_text("../elsewhere"), "names no generation"),
        (lambda f: (generation(f) / "manifest.json").write_text("{"), "not the manifest"),
        (lambda f: (generation(f) / "texts.bin").unlink(), "a file of its index is missing"),
        (lambda f: (generation(f) / "vectors.faiss").write_bytes(b"x"), "not a whole faiss index"),
        (lambda f: (generation(f) / "documents.msgpack").write_bytes(b"\xc1"), "is damaged"),
        (lambda f: (generation(f) / "texts.bin").write_bytes(b"x"), "don't match"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, damage: object, message: str) -> None:
    made().save(tmp_path)
    damage(tmp_path)  # type: ignore[operator]

    with pytest.raises(DataError, match=message) as caught:
        LocalIndex.open(tmp_path, WordEncoder())
    assert str(tmp_path) in str(caught.value)


def test_an_index_of_a_later_promptfed_is_refused(tmp_path: Path) -> None:
    made().save(tmp_path)
    path = generation(tmp_path) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))

    with pytest.raises(DataError, match="schema version 2, this promptfed reads 1"):
        LocalIndex.open(tmp_path, WordEncoder())


def test_an_empty_index_finds_nothing_and_is_saved_and_opened(tmp_path: Path) -> None:
    index = LocalIndex(WordEncoder())
    index.save(tmp_path)

    back = LocalIndex.open(tmp_path, WordEncoder())

    for mode in get_args(SearchMode):
        assert back.search(["anything"], 3, mode) == [[]]
    assert back.add(ALL) == Added(new=3)
    assert back.search(["leave"], 1)[0][0].doc_id == "leave"


def test_a_search_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="k = 0"):
        made().search(["leave"], 0)
    with pytest.raises(ConfigError, match="unknown mode 'fuzzy'"):
        made().search(["leave"], 1, "fuzzy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="can't overlap"):
        LocalIndex(WordEncoder(), passage_words=5, overlap_words=5)


def test_an_index_that_has_grown_takes_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "FLAT_MAX", 2)
    monkeypatch.setattr(vectors, "HNSW_MAX", 4)
    index = made(ALL[:2])
    kinds = [index.kind]

    for i in range(3):
        index.add([Document(doc_id=f"more{i}", text=f"More of it, number{i}.")])
        kinds.append(index.kind)

    assert kinds == ["flat", "hnsw", "hnsw", "ivf"]
    assert index._vectors is not None
    assert index._vectors.kind == "ivf"
    assert {hit.doc_id for hit in index.search(["leave pay more"], 5)[0]} == {"leave", "pay", "more0", "more1", "more2"}


def test_a_documents_vector_is_the_mean_of_its_passages() -> None:
    index = made([Document(doc_id="ab", text="a b"), LEAVE], passage_words=1, overlap_words=0)

    means, ids = index.document_vectors()

    assert ids == ["ab", "leave"]
    assert means[0] == pytest.approx(WordEncoder().encode(["a", "b"]).mean(axis=0))


def test_errors_hold_no_text(tmp_path: Path) -> None:
    index = made([Document(doc_id="d", text="canary-7391")])
    index.save(tmp_path)
    (generation(tmp_path) / "documents.msgpack").write_bytes(b"canary-7391")

    with pytest.raises(PromptfedError) as caught:
        LocalIndex.open(tmp_path, WordEncoder())

    assert "canary" not in str(caught.value)
    assert "canary" not in repr(index.search(["d"], 1))


class Shelf(RuleBasedStateMachine):
    """An index against a dictionary, through additions, deletions, and saving and opening."""

    kind: Kind = "flat"
    words = st.sampled_from(["red", "green", "blue", "black", "white"])

    def __init__(self) -> None:
        super().__init__()
        self.index = LocalIndex(WordEncoder(), kind=self.kind, passage_words=3, overlap_words=1)
        self.held: dict[str, str] = {}

    @rule(doc_id=st.sampled_from("abcd"), text=st.lists(words, max_size=8).map(" ".join))
    def add(self, doc_id: str, text: str) -> None:
        self.index.add([Document(doc_id=doc_id, text=text)])
        self.held.pop(doc_id, None) if not text else self.held.update({doc_id: text})

    @rule(doc_id=st.sampled_from("abcd"))
    def delete(self, doc_id: str) -> None:
        assert self.index.delete([doc_id]) == int(doc_id in self.held)
        self.held.pop(doc_id, None)

    @invariant()
    def holds_what_the_dictionary_holds(self) -> None:
        assert set(self.index.doc_ids) == set(self.held)
        hits = self.index.search(["red"], 100)[0]
        assert len(hits) == self.index.n_passages
        assert {hit.doc_id for hit in hits} == set(self.held)
        scores = WordEncoder().encode(["red"]) @ WordEncoder().encode([hit.text for hit in hits]).T
        assert np.allclose([hit.score for hit in hits], scores[0], atol=1e-5)
        assert all(hit.text in self.held[hit.doc_id] for hit in hits)


class Graph(Shelf):
    kind = "hnsw"


class Cells(Shelf):
    kind = "ivf"


for machine in (Shelf, Graph, Cells):
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestShelf, TestGraph, TestCells = Shelf.TestCase, Graph.TestCase, Cells.TestCase


def test_a_folder_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().save(tmp_path)
    current, done = index_module.store.current, []

    def replaced_meanwhile(folder: Path) -> Path:
        found = current(folder)
        if not done:
            done.append(found)
            monkeypatch.undo()
            other = LocalIndex.open(tmp_path, WordEncoder())
            other.delete(["fire"])
            other.save(tmp_path)
        return found

    monkeypatch.setattr(index_module.store, "sweep", lambda _: None)  # which asks for the current one too
    monkeypatch.setattr(index_module.store, "current", replaced_meanwhile)

    assert LocalIndex.open(tmp_path, WordEncoder()).doc_ids == ("leave", "pay")


class ShortReader(WordEncoder):
    """Reads three words and no more."""

    def encode(self, texts: Sequence[str]) -> FloatArray:
        return super().encode([" ".join(text.split()[:3]) for text in texts])

    def fits(self, text: str) -> bool:
        return len(text.split()) <= 3


def test_what_the_encoder_would_not_read_to_its_end_is_cut_until_it_does(caplog: pytest.LogCaptureFixture) -> None:
    index = LocalIndex(ShortReader())
    index.add([Document(doc_id="a", text="one two three four five six seven eight nine")])

    assert " ".join(index.passages("a")) == "one two three four five six seven eight nine"
    assert all(len(passage.split()) <= 3 for passage in index.passages("a"))
    assert index.search(["nine"], 1)[0][0].text.endswith("nine")
    assert caplog.text == ""
    LocalIndex(ShortReader(), passage_words=None).add([Document(doc_id="a", text="one two three canary")])
    assert "longer than words-64 reads" in caplog.text
    assert "canary" not in caplog.text


def test_another_encoder_of_the_same_name_is_found_out_when_it_is_used(tmp_path: Path) -> None:
    class Turned(WordEncoder):
        def encode(self, texts: Sequence[str]) -> FloatArray:
            return super().encode(texts)[:, ::-1]

    class Longer(WordEncoder):
        def __init__(self) -> None:
            super().__init__(100)

    made().save(tmp_path)

    for other in (Turned(), Longer()):
        index = LocalIndex.open(tmp_path, other)
        assert len(index) == 3  # what needs no vector goes on
        with pytest.raises(ConfigError, match="is another than the one that this index was made with"):
            index.search(["leave"], 1)
        with pytest.raises(ConfigError, match="is another"):
            index.add([Document(doc_id="new", text="new")])
        with pytest.raises(ConfigError, match="is another"):
            index.check_encoder()
    assert LocalIndex.open(tmp_path, WordEncoder()).search(["leave"], 1)[0][0].doc_id == "leave"


def test_an_encoder_a_little_off_does_not_wander_off(tmp_path: Path) -> None:
    """What an index is known by stays that of the encoder that made it, however often another number format saves."""

    class Off(WordEncoder):
        encoder_id = "words-64"

        def __init__(self, angle: float) -> None:
            super().__init__()
            self.angle = angle

        def encode(self, texts: Sequence[str]) -> FloatArray:
            out = super().encode(texts)
            out[:, 0], rest = np.cos(self.angle) * out[:, 0] + self.angle, out[:, 1:]
            return np.asarray(out / np.linalg.norm(np.c_[out[:, :1], rest], axis=1, keepdims=True))

    made().save(tmp_path)
    refused = 0
    for angle in np.arange(0.05, 0.8, 0.05):
        index = LocalIndex.open(tmp_path, Off(float(angle)))
        try:
            index.add([Document(doc_id=f"{angle:.2f}", text="something new")])
            index.save(tmp_path)
        except ConfigError:
            refused += 1
    assert refused > 8


def test_an_index_of_before_there_were_probes_knows_its_encoder_too(tmp_path: Path) -> None:
    class Turned(WordEncoder):
        def encode(self, texts: Sequence[str]) -> FloatArray:
            return super().encode(texts)[:, ::-1]

    made().save(tmp_path)
    path = generation(tmp_path) / "manifest.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "probe"}))

    with pytest.raises(ConfigError, match="is another"):
        LocalIndex.open(tmp_path, Turned()).search(["leave"], 1)
    index = LocalIndex.open(tmp_path, WordEncoder())
    assert index.search(["leave"], 1)[0][0].doc_id == "leave"
    index.delete(["pay"])
    index.save(tmp_path)
    assert json.loads((generation(tmp_path) / "manifest.json").read_text())["probe"]


def test_vectors_that_are_none_are_refused() -> None:
    class Broken(WordEncoder):
        def encode(self, texts: Sequence[str]) -> FloatArray:
            return super().encode(texts) * (np.nan if "bad" in texts else 1.0)

    index = LocalIndex(Broken())
    with pytest.raises(ConfigError, match="not of finite numbers"):
        index.add([Document(doc_id="a", text="bad")])
    assert len(index) == 0


def test_half_a_character_may_be_looked_for() -> None:
    assert made().search(["leave \udce9"], 1)[0][0].doc_id == "leave"


def test_what_a_killed_save_left_behind_goes_when_the_index_is_opened(tmp_path: Path) -> None:
    made().save(tmp_path)
    for name in ("generation-000001-0123456789abcdef", "generation-000009-0123456789abcdef.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "texts.bin").write_bytes(b"deleted long ago")

    LocalIndex.open(tmp_path, WordEncoder())

    assert list(tmp_path.glob("generation-*")) == [generation(tmp_path)]


def test_what_can_not_be_removed_is_named_and_the_save_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = made()
    index.save(tmp_path)
    index.delete(["pay"])

    def denied(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_module.store.shutil, "rmtree", denied)

    with pytest.raises(DataError, match="may hold what was deleted from it, can't be removed"):
        index.save(tmp_path)

    assert LocalIndex.open(tmp_path, WordEncoder()).doc_ids == ("leave", "fire")
    assert "can't be removed" in caplog.text
    monkeypatch.undo()
    index.add([PAY])
    index.save(tmp_path)
    assert list(tmp_path.glob("generation-*")) == [generation(tmp_path)]


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = made()
    index.save(tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    index.delete(["pay"])

    def full(*_: object) -> None:
        raise RuntimeError("Error in faiss: write error")

    monkeypatch.setattr(vectors.faiss, "write_index", full)

    with pytest.raises(DataError, match="can't be written; is the disk full"):
        index.save(tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    monkeypatch.undo()
    index.save(tmp_path)
    assert LocalIndex.open(tmp_path, WordEncoder()).doc_ids == ("leave", "fire")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_save_that_can_not_be_made_to_count_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    index = made()
    if not is_first:
        index.save(tmp_path)
        index.delete(["pay"])
    before = sorted(tmp_path.rglob("*"))

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module.store, "write_whole", full)
    with pytest.raises(DataError, match=r"can't be written \(No space left on device\); it is as it was"):
        index.save(tmp_path)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "lock"] == [
        path for path in before if path.name != "lock"
    ]
    monkeypatch.undo()
    index.save(tmp_path)
    assert len(LocalIndex.open(tmp_path, WordEncoder())) == len(index)


def test_a_save_that_is_stopped_once_it_counts_has_lost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = made()
    index.save(tmp_path)
    index.delete(["pay"])
    write = index_module.store.write_whole

    def stopped(path: Path, content: str) -> None:
        write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(index_module.store, "write_whole", stopped)
    with pytest.raises(KeyboardInterrupt):
        index.save(tmp_path)

    assert LocalIndex.open(tmp_path, WordEncoder()).doc_ids == ("leave", "fire")


def test_where_nothing_can_be_locked_an_index_is_read_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made().save(tmp_path)

    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(index_module.store.fcntl, "flock", unsupported)

    index = LocalIndex.open(tmp_path, WordEncoder())
    assert index.search(["leave"], 1)[0][0].doc_id == "leave"
    assert "can't be locked (Function not implemented)" in caplog.text
    with pytest.raises(DataError, match="can't be locked"):
        index.save(tmp_path)


def test_a_save_removes_what_was_before_even_if_others_wait_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so before they may, and not by `sweep`, which leaves the folder to whoever is saving."""
    monkeypatch.setattr(index_module.store, "sweep", lambda _: None)
    index = made()
    index.save(tmp_path)
    index.delete(["pay"])
    index.save(tmp_path)

    assert list(tmp_path.glob("generation-*")) == [generation(tmp_path)]


def test_a_folder_that_can_not_be_made_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    with pytest.raises(DataError, match="can't be made"):
        made().save(tmp_path / "file" / "index")


def test_a_save_waits_for_another_and_says_so_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = made()
    index.save(tmp_path)
    with index_module.store._alone(tmp_path):
        monkeypatch.setattr(index_module.store, "PATIENCE_S", 0.1)
        with pytest.raises(DataError, match=r"another process has been saving for 0.1 s"):
            index.save(tmp_path)
        assert LocalIndex.open(tmp_path, WordEncoder()).doc_ids == ("leave", "pay", "fire")


def test_an_unknown_kind_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="unknown kind 'HNSW' of index; known: flat"):
        LocalIndex(WordEncoder(), kind=cast(Any, "HNSW"))
