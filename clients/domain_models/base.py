"""What every domain model can do, and what those with parameters can do besides.

A kind is registered under the entry-point group ``promptfed.domain_models`` and made with (encoder, n_labels, seed).
Models of different kinds understand one another by what they say of texts (`predict_proba`); models of one kind with
parameters may also be averaged (`Averageable`).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from promptfed.errors import DataError
from promptfed.files import write_whole
from promptfed.plugins import DOMAIN_MODELS, find
from promptfed.types import DomainModel, Encoder, FloatArray
from retrieval.encoder import load_encoder


@runtime_checkable
class Averageable(DomainModel, Protocol):
    """A domain model whose flat ``parameters`` can be averaged over clients."""

    parameters: FloatArray

    def trained(self, texts: Sequence[str], targets: FloatArray, *, n_steps: int, proximal: float = 0.0) -> FloatArray:
        """The parameters after ``n_steps`` of local training from those that it has, which stay as they are.

        ``proximal`` / 2 times the squared distance to where it started is added to the loss, a mean over texts
        (FedProx: Li et al., MLSys 2020, arXiv 1812.06127, equation 2).
        """
        ...


def make_domain_model(kind: str, encoder: Encoder, n_labels: int, *, seed: int = 0) -> DomainModel:
    """An unfitted domain model by its registered kind. Raises `UnknownNameError`."""
    model: DomainModel = find(DOMAIN_MODELS, "domain model", kind)(encoder, n_labels, seed=seed)
    return model


@runtime_checkable
class Restorable(Protocol):
    """A domain model without parameters to average that can be kept: ``state`` is arrays by name."""

    state: Mapping[str, np.ndarray[Any, Any]]


def save_model(path: Path, model: DomainModel, kind: str, labels: Sequence[str], encoder_id: str) -> None:
    """Keep a fitted model in one file of arrays, with what has to fit when it is read."""
    state: Mapping[str, Any] = {"parameters": model.parameters} if isinstance(model, Averageable) else {}
    if isinstance(model, Restorable):
        state = model.state
    about = json.dumps({"kind": kind, "labels": list(labels), "encoder": encoder_id})
    content = io.BytesIO()
    np.savez(content, about=np.array(about), **{f"state_{name}": value for name, value in state.items()})
    write_whole(path, content.getvalue())


def load_model(path: Path, labels: Sequence[str], encoder: Encoder | None = None) -> DomainModel:
    """What `save_model` kept, with the encoder that it names unless one is given. Raises `DataError` where it is of
    other ``labels`` or another encoder, or no such file."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            state = {name.removeprefix("state_"): kept[name] for name in kept.files if name != "about"}
        kind, of_labels, encoder_id = about["kind"], about["labels"], about["encoder"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a domain model that promptfed kept ({type(error).__name__})") from None
    if of_labels != list(labels):
        raise DataError(f"{path}: its labels are {', '.join(of_labels)}; expected {', '.join(labels)}, in that order")
    if encoder is not None and encoder.encoder_id != encoder_id:
        raise DataError(f"{path}: trained with encoder {encoder_id!r}, not {encoder.encoder_id!r}")
    model = make_domain_model(kind, encoder or load_encoder(encoder_id), len(labels))
    if isinstance(model, Restorable):
        model.state = state
    elif isinstance(model, Averageable) and "parameters" in state:
        model.parameters = state["parameters"]
    else:
        raise DataError(f"{path}: holds nothing that a domain model of kind {kind!r} can be made from")
    return model


def out_of_fold(
    make: Callable[[], DomainModel], texts: Sequence[str], targets: FloatArray, *, folds: int = 5
) -> FloatArray:
    """Probabilities (n, K) of each text by a model that did not see it. Fold of text i is i mod ``folds``.

    With fewer texts than folds each text is left out alone; a single text gets the uniform prediction.
    """
    n, n_labels = targets.shape
    out = np.full((n, n_labels), 1.0 / n_labels)
    fold = np.arange(n) % min(folds, max(n, 1))
    for f in np.unique(fold):
        held = fold == f
        if not held.all():
            model = make().fit([texts[i] for i in np.flatnonzero(~held).tolist()], targets[~held])
            out[held] = model.predict_proba([texts[i] for i in np.flatnonzero(held).tolist()])
    return out


def smoothed(proba: FloatArray) -> FloatArray:
    """Finite log-probabilities for stacking."""
    return np.log(np.clip(proba, 1e-4, None))
