"""Reading private data: bad input is a `DataError` that names the place and never shows a text."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.data import Rows, assemble, client_rng, read_rows, read_texts, scoring_order
from promptfed.errors import DataError

COLUMNS = {"client_column": "client", "text_column": "text", "label_column": "label"}
SECRET = "my neighbour's blood test"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(tmp_path: Path, content: str | bytes, **changes: str) -> Rows:
    return read_rows(write(tmp_path / "train.csv", content), **{**COLUMNS, **changes})


# ---------------------------------------------------------------- good files


def test_rows_by_hand(tmp_path: Path) -> None:
    got = rows_of(tmp_path, 'label,text,extra,client\ngood,"one, two",x,a\nbad,three,y,b\n')

    assert got == [("a", "one, two", "good"), ("b", "three", "bad")]


def test_labels_and_clients_are_stripped_and_texts_are_not(tmp_path: Path) -> None:
    got = rows_of(tmp_path, "client,text,label\n a , two words  , good \n")

    assert got == [("a", " two words  ", "good")]


def test_a_text_may_hold_line_breaks_quotes_and_any_script(tmp_path: Path) -> None:
    got = rows_of(tmp_path, 'client,text,label\r\na,"line\r\nbreak ""quoted"" 文字 😀",good\r\n')

    assert got == [("a", 'line\r\nbreak "quoted" 文字 😀', "good")]


def test_a_byte_order_mark_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    got = rows_of(tmp_path, "\ufeffclient, text ,label\n\na,one,good\n\n\n")

    assert got == [("a", "one", "good")]


def test_a_given_client_stands_in_for_the_column(tmp_path: Path) -> None:
    got = read_rows(write(tmp_path / "t.csv", "text,label\none,good\n"), client="north", **COLUMNS)

    assert got == [("north", "one", "good")]


def test_an_empty_text_is_still_a_row(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "client,text,label\na,,good\n") == [("a", "", "good")]


def test_a_gzipped_file_reads_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv.gz", gzip.compress(b"client,text,label\na,one,good\n"))

    assert read_rows(path, **COLUMNS) == [("a", "one", "good")]


def test_a_text_of_a_megabyte_is_read(tmp_path: Path) -> None:
    got = rows_of(tmp_path, f"client,text,label\na,{'long ' * 200_000},good\n")

    assert len(got[0][1]) == 1_000_000


def test_public_texts_leave_out_empty_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "public.csv", "text,note\none,x\n  ,y\ntwo,z\n")

    assert read_texts(path, text_column="text") == ["one", "two"]


# ---------------------------------------------------------------- bad files

BAD: dict[str, tuple[str | bytes, list[str]]] = {
    "missing column": (f"client,text,lable\na,{SECRET},good\n", ["'label'"]),
    "missing client column": (f"text,label\n{SECRET},good\n", ["'client'"]),
    "empty file": ("", ["empty"]),
    "header only": ("client,text,label\n", ["no rows"]),
    "header and blank lines": ("client,text,label\n\n\n", ["no rows"]),
    "duplicated header": (f"client,text,label,text\na,{SECRET},good,{SECRET}\n", ["2 columns", "'text'"]),
    "not UTF-8": (f"client,text,label\na,{SECRET} caf\u00e9,good\n".encode("latin-1"), ["UTF-8"]),
    "UTF-16": (f"client,text,label\na,{SECRET},good\n".encode("utf-16"), ["UTF-8"]),
    "too few fields": (f"client,text,label\na,one,good\na,{SECRET}\n", ["row 3", "2 fields"]),
    "too many fields": (f"client,text,label\na,{SECRET},{SECRET},good\n", ["row 2", "4 fields"]),
    "empty label": (f"client,text,label\na,one,good\na,{SECRET}, \n", ["row 3", "'label'"]),
    "empty client": (f"client,text,label\n ,{SECRET},good\n", ["row 2", "'client'"]),
    "no header at all": (f"a,{SECRET},good\na,{SECRET} again,bad\n", ["'text'"]),
    "a quote that never closes": (f'client,text,"label\na,{SECRET},good\n', ["'label'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_place_and_without_the_text(tmp_path: Path, name: str) -> None:
    content, expected = BAD[name]
    path = write(tmp_path / "train.csv", content)

    with pytest.raises(DataError) as caught:
        read_rows(path, **COLUMNS)

    message = str(caught.value)
    assert str(path) in message
    assert all(part in message for part in expected), message
    assert "neighbour" not in message
    assert "blood" not in message
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["missing.csv", "missing.csv.gz"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"missing\.csv.*: no such file"):
        read_rows(tmp_path / name, **COLUMNS)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_texts(tmp_path, text_column="text")


GOOD_GZ = gzip.compress(f"client,text,label\na,{SECRET} {'x' * 300},good\n".encode())


@pytest.mark.parametrize(
    "content",
    [b"client,text,label\n", GOOD_GZ[:30], GOOD_GZ[:20] + b"\xff" * 10 + GOOD_GZ[30:], GOOD_GZ[:-6] + b"\0" * 6, b""],
    ids=["not gzip", "cut off", "damaged inside", "wrong checksum", "empty"],
)
def test_a_damaged_gzip_file_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "train.csv.gz", content)

    with pytest.raises(DataError) as caught:
        read_rows(path, **COLUMNS)

    assert str(path) in str(caught.value)


def test_the_public_file_is_checked_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "public.csv", f"title\n{SECRET}\n")

    with pytest.raises(DataError, match=r"public\.csv: no column 'text'"):
        read_texts(path, text_column="text")


# ---------------------------------------------------------------- assemble


def test_assemble_groups_by_client_and_counts_dropped_rows() -> None:
    train = [("b", "one", "good"), ("a", "two", "bad"), ("a", "  ", "bad"), ("a", "three", "good")]
    test = [("a", "four", "good"), ("a", "", "bad"), ("b", "five", "bad")]

    a, b = assemble(train, test, ("bad", "good"), seed=1)

    assert (a.client_id, b.client_id) == ("a", "b")
    assert set(zip(a.train.texts, a.train.labels.tolist(), strict=True)) == {("two", 0), ("three", 1)}
    assert (a.test.texts, a.test.labels.tolist()) == (("four",), [1])
    assert (a.n_dropped, b.n_dropped) == (2, 0)
    assert b.train.labels.dtype == np.int64


def test_a_client_is_ordered_alike_in_any_federation() -> None:
    mine = [("a", f"text {i}", "good" if i % 2 else "bad") for i in range(20)]
    others = [("z", f"other {i}", "good") for i in range(5)]

    alone = assemble(mine, [], ("bad", "good"), seed=3)[0]
    together = assemble([*others, *mine], [], ("bad", "good"), seed=3)[0]
    reseeded = assemble(mine, [], ("bad", "good"), seed=4)[0]

    assert alone.train.texts == together.train.texts
    assert alone.train.texts != reseeded.train.texts
    assert sorted(alone.train.texts) == sorted(reseeded.train.texts)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([("a", SECRET, "ugly")], [], ["train", "ugly", "bad, good"]),
        ([("a", SECRET, "good")], [("a", SECRET, "ugly")], ["test", "ugly"]),
        ([("a", SECRET, "good")], [("b", SECRET, "good")], ["test", "b"]),
        ([("a", " ", "good"), ("b", SECRET, "good")], [], ["'a'"]),
    ],
)
def test_data_that_does_not_fit_together_is_refused(train: Rows, test: Rows, expected: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        assemble(train, test, ("bad", "good"), seed=1)

    assert all(part in str(caught.value) for part in expected)
    assert "blood" not in str(caught.value)


# ---------------------------------------------------------------- randomness and order


def test_clients_have_generators_of_their_own() -> None:
    draws = {
        client_rng(1, "a").random(),
        client_rng(1, "b").random(),
        client_rng(2, "a").random(),
        client_rng(1, "a", 7).random(),
    }

    assert len(draws) == 4
    assert client_rng(1, "a").random() == client_rng(1, "a").random()


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=60), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_every_prefix_of_the_scoring_order_has_about_the_labels_of_the_whole(labels: list[int], seed: int) -> None:
    array = np.array(labels)

    order = scoring_order(array, np.random.default_rng(seed))

    assert sorted(order.tolist()) == list(range(len(labels)))
    for n in range(1, len(labels) + 1):
        for label in set(labels):
            share = (array == label).mean()
            assert abs((array[order[:n]] == label).sum() - n * share) <= 2.0


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (["Good", "bad", "good"], "train has labels Good; expected bad, good"),
        (["the canary of north sings"], "train has 1 labels that are not among bad, good: is it the right column?"),
        ([f"word{i}" for i in range(6)], "train has 6 labels that are not among bad, good"),
        (["canary" * 10], "train has 1 labels"),
    ],
)
def test_labels_that_are_not_expected_are_named_unless_they_may_be_texts(found: list[str], says: str) -> None:
    with pytest.raises(DataError) as error:
        assemble([("a", "one", label) for label in found], [], ["bad", "good"], 0)

    assert str(error.value).startswith(says)
    assert "canary" not in str(error.value)
