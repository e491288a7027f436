"""Encoders: the real MiniLM, and the memory around it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from promptfed.errors import ConfigError
from promptfed.types import FloatArray
from retrieval.documents import Document
from retrieval.encoder import RememberingEncoder, SentenceEncoder
from retrieval.index import LocalIndex
from tests.support import WordEncoder


@pytest.fixture(scope="session")
def minilm() -> SentenceEncoder:
    return SentenceEncoder()


@pytest.mark.model
def test_vectors_are_unit_vectors_of_384_numbers(minilm: SentenceEncoder) -> None:
    vectors = minilm.encode(["One text.", "Another one, somewhat longer than the first.", "", "文字 😀", "x " * 3000])

    assert vectors.shape == (5, 384)
    assert vectors.dtype == np.float64
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-9)


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        ("leave " * 200, True),
        ("leave " * 254, True),
        ("leave " * 255, False),
        ("文" * 300, False),
        ("\uac11 " * 120, False),
    ],
)
def test_it_knows_what_it_reads_to_its_end(minilm: SentenceEncoder, text: str, fits: bool) -> None:
    assert minilm.fits(text) == fits
    if not fits:  # and what it says is so
        more, less = minilm.encode([text + " judge", text])
        assert more @ less == pytest.approx(1.0, abs=1e-6)


@pytest.mark.model
def test_to_count_does_not_change_what_others_read_meanwhile(minilm: SentenceEncoder) -> None:
    long = "word " * 400
    expected = minilm.encode([long])[0]
    with ThreadPoolExecutor(2) as threads:
        counted = [threads.submit(minilm.fits, long) for _ in range(400)]
        read = [threads.submit(minilm.encode, [long]) for _ in range(20)]

    assert not any(c.result() for c in counted)
    assert min(float(r.result()[0] @ expected) for r in read) > 0.9999


@pytest.mark.model
def test_all_of_a_text_without_spaces_is_found(minilm: SentenceEncoder) -> None:
    index = LocalIndex(minilm)
    index.add([Document(doc_id="long", text="文" * 2000 + "法" * 200)])

    assert all(minilm.fits(passage) for passage in index.passages("long"))
    assert "法" in index.search(["法" * 100], 1)[0][0].text


@pytest.mark.model
def test_sentences_that_mean_alike_are_closer(minilm: SentenceEncoder) -> None:
    film, movie, tax = minilm.encode(
        ["I enjoyed the film a lot.", "What a great movie that was!", "The tax return is due in May."]
    )

    assert film @ movie > 0.5
    assert film @ movie > film @ tax + 0.3


@pytest.mark.model
def test_a_vector_hardly_depends_on_the_company(minilm: SentenceEncoder) -> None:
    texts = ["Short.", "A text of middling length, as they go.", "A long one. " * 20]

    together = minilm.encode(texts)
    alone = np.concatenate([minilm.encode([t]) for t in texts])

    assert (together * alone).sum(axis=1) == pytest.approx(np.ones(3), abs=0.005)


@pytest.mark.model
def test_no_text_no_vector(minilm: SentenceEncoder) -> None:
    assert minilm.encode([]).shape == (0, 384)


def test_the_name_is_the_id() -> None:
    assert SentenceEncoder().encoder_id == "all-minilm-l6-v2"
    assert RememberingEncoder(SentenceEncoder("other")).encoder_id == "other"


@pytest.mark.model
def test_a_folder_without_a_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path.name}.*can't be loaded"):
        SentenceEncoder(str(tmp_path)).encode(["x"])


# ---------------------------------------------------------------- memory


class CountingEncoder(WordEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> FloatArray:
        self.asked.append(list(texts))
        return super().encode(texts)


def test_a_text_is_encoded_once() -> None:
    inner = CountingEncoder()
    encoder = RememberingEncoder(inner)

    first = encoder.encode(["one", "two", "one"])
    second = encoder.encode(["two", "three"])
    encoder.encode(["one", "three"])

    assert inner.asked == [["one", "two"], ["three"]]
    assert first == pytest.approx(WordEncoder().encode(["one", "two", "one"]))
    assert second == pytest.approx(WordEncoder().encode(["two", "three"]))


def test_what_is_handed_out_is_not_the_memory_itself() -> None:
    encoder = RememberingEncoder(WordEncoder())

    encoder.encode(["one"])[:] = 0.0

    assert np.linalg.norm(encoder.encode(["one"])) == pytest.approx(1.0)
