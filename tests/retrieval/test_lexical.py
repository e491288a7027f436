"""Words, whatever their case, Unicode form and script."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from retrieval.lexical import LexicalIndex

TEXTS = ["Das MÜLLER café", "员工每年有三十天带薪休假", "ラーメンを食べる", "คนกินข้าวแล้ว", "Straße 12", "हिन्दी में"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("müller", 0),
        (unicodedata.normalize("NFD", "Müller Café"), 0),
        ("带薪休假", 1),
        ("ラーメン", 2),
        ("ข้าว", 3),
        ("กิน", 3),
        ("हिन्दी", 5),
        ("STRASSE", 4),
        ("\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT TWO}", 4),
    ],
)
def test_a_word_finds_its_text(query: str, found: int) -> None:
    index = LexicalIndex(TEXTS, np.arange(len(TEXTS)))

    assert index.search(query, 1)[1].tolist() == [found]


@pytest.mark.parametrize(("query", "text"), [("น้ำ", "ตา"), ("हिन्दी", "हद")])
def test_parts_of_a_letter_are_no_words(query: str, text: str) -> None:
    assert LexicalIndex([text], np.arange(1)).search(query, 1)[1].tolist() == []


def test_a_character_alone_is_a_word_only_where_it_stands_alone() -> None:
    index = LexicalIndex(["休", "休假"], np.arange(2))

    assert index.search("休", 2)[1].tolist() == [0]
    assert index.search("休假", 2)[1].tolist() == [1]
