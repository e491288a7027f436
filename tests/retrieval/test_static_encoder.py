"""The encoder without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from promptfed.errors import ConfigError
from retrieval.encoder import SentenceEncoder, load_encoder
from retrieval.static_encoder import N_COMMON, StaticEncoder, weighted

ROOT = Path(__file__).parents[2]


def test_what_all_tokens_have_in_common_is_taken_off_and_rare_ones_count_more() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(N_COMMON, 12))
    own = 0.1 * rng.normal(size=(400, 12))
    table = 5.0 + rng.normal(size=(400, N_COMMON)) @ (10 * common) + own

    vectors = weighted(table, first_word=0)

    assert np.abs(vectors @ np.linalg.qr(common.T)[0]).max() < 0.2 * np.abs(vectors).max()
    assert (vectors[0] == 0).all()
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths[-100:].mean() > 2 * lengths[1:50].mean()


@pytest.mark.model
def test_texts_about_the_same_are_near() -> None:
    encoder = StaticEncoder()

    x = encoder.encode(
        ["The engine of the car is broken.", "a car with a damaged engine", "a judge in a court", "", "x" * 9000]
    )

    assert x.shape == (5, 384)
    assert np.linalg.norm(x, axis=1) == pytest.approx(np.ones(5))
    assert x[0] @ x[1] > 0.3 + x[0] @ x[2]
    assert x[3].tolist() == [1.0, *[0.0] * 383]
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.model
def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from retrieval.static_encoder import StaticEncoder; from retrieval.index import LocalIndex\n"
        "from retrieval.documents import Document\n"
        "index = LocalIndex(StaticEncoder()); index.add([Document(doc_id='a', text='a judge'),"
        " Document(doc_id='b', text='an engine')])\n"
        "print(index.search(['the court'], 1)[0][0].doc_id, 'torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)

    assert done.stdout.split() == ["a", "False"]


def test_an_encoder_is_loaded_by_name(tmp_path: Path) -> None:
    assert load_encoder("static:all-minilm-l6-v2").encoder_id == "static:all-minilm-l6-v2"
    assert isinstance(load_encoder("all-minilm-l6-v2"), SentenceEncoder)
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_encoder(f"static:{tmp_path}").encode(["a"])
