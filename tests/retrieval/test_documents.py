"""Cutting documents into passages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from retrieval.documents import Document, passages


def test_a_window_begins_before_the_end_of_the_last_one() -> None:
    assert list(passages("a b c d e f g", 4, 1)) == ["a b c d", "d e f g"]
    assert list(passages("a b c d e f g h", 4, 1)) == ["a b c d", "d e f g", "g h"]
    assert list(passages("a  b\nc", 4, 1)) == ["a  b\nc"]
    assert list(passages(" \n ", 4, 1)) == []


@given(st.lists(st.sampled_from("abcde"), max_size=60), st.integers(2, 9), st.data())
def test_windows_hold_every_word_and_none_is_within_another(words: list[str], size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))

    parts = [part.split() for part in passages(" ".join(words), size, overlap)]

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
