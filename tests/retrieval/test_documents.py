"""Cutting documents into passages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfed.errors import DataError
from retrieval.documents import Document, passages, read_documents


def windows(text: str, n_words: int, n_overlap: int) -> list[str]:
    return [text[start:stop] for start, stop in passages(text, n_words, n_overlap)]


def test_a_window_begins_before_the_end_of_the_last_one() -> None:
    assert windows("a b c d e f g", 4, 1) == ["a b c d", "d e f g"]
    assert windows("a b c d e f g h", 4, 1) == ["a b c d", "d e f g", "g h"]
    assert windows(" a  b\nc ", 4, 1) == ["a  b\nc"]
    assert windows(" \n ", 4, 1) == []


def test_a_script_without_spaces_is_cut_too() -> None:
    assert windows("文" * 100, 2, 0) == ["文" * 48, "文" * 48, "文" * 4]


@given(st.lists(st.sampled_from("abcde"), max_size=60), st.integers(2, 9), st.data())
def test_windows_hold_every_word_and_none_is_within_another(words: list[str], size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))

    parts = [part.split() for part in windows(" ".join(words), size, overlap)]

    rebuilt = parts[0] + [w for part in parts[1:] for w in part[overlap:]] if parts else []
    assert rebuilt == words
    assert all(len(part) == size for part in parts[:-1])
    assert all(len(part) > overlap for part in parts[1:])


def test_a_digest_is_of_id_text_and_metadata() -> None:
    document = Document(doc_id="a", text="one", metadata={"x": 1, "y": 2})

    assert document.digest == Document(doc_id="a", text="one", metadata={"y": 2, "x": 1}).digest
    others = [
        Document(doc_id="b", text="one", metadata={"x": 1, "y": 2}),
        Document(doc_id="a", text="two", metadata={"x": 1, "y": 2}),
        Document(doc_id="a", text="one", metadata={"x": 1, "y": 3}),
    ]
    assert len({document.digest, *(other.digest for other in others)}) == 4
    assert "one" not in repr(document)


def test_metadata_that_can_not_be_kept_is_refused_by_the_documents_name() -> None:
    with pytest.raises(DataError, match="document 'a': metadata can't be kept"):
        _ = Document(doc_id="a", text="secret", metadata={"when": object()}).digest


def test_documents_of_a_table_keep_the_other_columns(tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_text("id,text,page\na,One text.,3\nb, ,4\n")

    assert read_documents(tmp_path / "docs.csv") == [
        Document(doc_id="a", text="One text.", metadata={"page": "3"}),
        Document(doc_id="b", text=" ", metadata={"page": "4"}),
    ]


def test_documents_of_a_folder_are_its_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.MD").write_text("Two.")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne.")
    (tmp_path / "c.pdf").write_text("no")

    assert read_documents(tmp_path) == [Document(doc_id="a.txt", text="One."), Document(doc_id="sub/b.MD", text="Two.")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("docs.csv", "id,text\na,canary\na,canary\n", "row 3: a second document with the id of an earlier one"),
        ("docs.csv", "id,text\n ,canary\n", "row 2: column 'id' is empty"),
        ("docs.csv", "number,body\na,canary\n", "no column 'id'"),
        ("sub/c.pdf", "canary", "no .txt or .md file in it"),
        ("sub/c.txt", b"canary \xff", "not UTF-8"),
    ],
)
def test_what_can_not_be_read_is_named_without_its_text(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)

    with pytest.raises(DataError, match=says) as caught:
        read_documents(path.parent if "/" in name else path)
    assert "canary" not in str(caught.value)


def test_a_window_that_does_not_fit_is_halved() -> None:
    text = "aaaa bb cc dddddd e f"

    parts = [text[start:stop] for start, stop in passages(text, 4, 0, lambda part: len(part) <= 8)]

    assert parts == ["aaaa bb", "cc", "dddddd", "e f"]


@pytest.mark.parametrize(("doc_id", "says"), [("", "id is empty"), ("a\udce9.txt", "not text in UTF-8")])
def test_an_id_that_can_not_be_written_is_refused(doc_id: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Document(doc_id=doc_id, text="x")


@pytest.mark.parametrize("metadata", [{("x", "y"): 1}, {"a": {("x", "y"): 1}}, {"a": object()}, {"a": 2**70}])
def test_metadata_that_could_not_be_read_again_is_refused(metadata: dict[Any, Any]) -> None:
    with pytest.raises(DataError, match="metadata can't be kept"):
        _ = Document(doc_id="a", text="x", metadata=metadata).digest


def test_ids_and_texts_are_in_two_columns(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("id,text\na,b\n")

    with pytest.raises(DataError, match="can't both be in column 'text'"):
        read_documents(tmp_path / "d.csv", id_column="text")
