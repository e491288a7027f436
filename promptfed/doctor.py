"""What `promptfed doctor` looks at."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from time import perf_counter

import numpy as np

from promptfed.errors import ConfigError, PromptfedError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.fm.packed import fast_dtype
from promptfed.fm.weights import cache_folder, find_weights
from promptfed.registry import load_fm
from promptfed.types import FloatArray
from retrieval.encoder import SentenceEncoder

Check = tuple[str, bool, str]  # name, whether it is in order, what was found

# Made up, and about as long as a sentence of a review.
SAMPLE = tuple(
    f"Example {i}: the parcel came on a rainy day and everything in it was as the shop had said." for i in range(64)
)


def checks(fm_address: str) -> list[Check]:
    """Every check in order; one that fails does not stop the others."""
    return [
        _check("Python", lambda: platform.python_version()),
        _check("PyTorch", _torch),
        _check("cache folder", _cache),
        _check(f"FM {fm_address}", lambda: _fm(fm_address)),
        _check("encoder", _encoder),
    ]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return name, True, look()
    except (PromptfedError, OSError, ImportError) as error:
        return name, False, str(error)


def _torch() -> str:
    import torch

    has_bf16 = fast_dtype() == torch.bfloat16
    bf16 = "bfloat16 in hardware" if has_bf16 else "no bfloat16 in hardware: float32, some 4 times as slow"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {bf16}"


def _cache() -> str:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return f"{folder}, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"


def _fm(address: str) -> str:
    model = load_fm(address)
    prompt, labels = "Text: {text}\nLabel:", ["good", "bad"]
    model.score_labels(prompt, SAMPLE[:8], labels)
    start = perf_counter()
    scores = model.score_labels(prompt, SAMPLE, labels)
    rate = len(SAMPLE) / (perf_counter() - start)
    failed = int(np.ma.getmaskarray(scores).any(axis=1).sum())
    can = ", ".join(sorted(model.capabilities))
    said = f"{model.fm_id}: {can}; {rate:.0f} label calls a second on short texts; {failed} of {len(SAMPLE)} failed"
    twin = _twin(model.fm_id)
    if twin is not None:
        own = twin.score_labels(prompt, SAMPLE, labels)
        apart = float(np.abs(scores - own).mean())
        alike = float((scores.argmax(axis=1) == own.argmax(axis=1)).mean())
        said += f"; against the same weights embedded: {apart:.3f} apart on average, same label on {alike:.0%}"
    return said


def _twin(fm_id: str) -> BaseFM | None:
    """The embedded engine with the weights of a server's model, if they are on this machine."""
    kind, _, rest = fm_id.partition(":")
    name, _, digest = rest.rpartition("@")
    if kind == "embedded":
        return None
    try:
        return load_fm(f"embedded:{name}") if find_weights(name, fetch=False)[1] == digest else None
    except (ConfigError, UnknownNameError):
        return None


def _encoder() -> str:
    encoder = SentenceEncoder()
    start = perf_counter()
    vectors: FloatArray = encoder.encode(SAMPLE)
    rate = len(SAMPLE) / (perf_counter() - start)
    return f"{encoder.encoder_id}: {vectors.shape[1]} dimensions, {rate:.0f} texts a second with loading"
