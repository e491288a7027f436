"""What every domain model can do, and what those with parameters can do besides.

A kind is registered under the entry-point group ``promptfed.domain_models`` and made with (encoder, n_labels, seed).
Models of different kinds understand one another by what they say of texts (`predict_proba`); models of one kind with
parameters may also be averaged (`Averageable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from promptfed.plugins import DOMAIN_MODELS, find
from promptfed.types import DomainModel, Encoder, FloatArray


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
