"""CMA-ES over the intrinsic vector of a soft prompt: what server and clients share of it.

The update of mean, covariance and step size is that of the `cma` package (Hansen, arXiv 1604.00772). This module opens
it so that it draws from a given generator only, and says how a search distribution N(mean, sigma^2 C) travels.

A client searches in whitened coordinates: CMA-ES does the same from (0, sigma, I) under z = mean + root(C) y as from
(mean, sigma, C), so that no form of C needs a search of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from promptfed.errors import WireError
from promptfed.messages.methods import CovarianceForm, packed, unpacked
from promptfed.types import FloatArray

# A variance below this is a direction that the search has given up.
LEAST_VARIANCE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """N(mean, sigma^2 C). ``covariance`` is C as it travels: see `pack`."""

    mean: FloatArray
    sigma: float
    form: CovarianceForm
    covariance: bytes


def pack(covariance: FloatArray, form: CovarianceForm, rank: int) -> bytes:
    """C, (d, d) or its diagonal (d,), as it travels: ``full``, the lower triangle row by row; ``separable``, the
    diagonal; ``low_rank``, the mean of all eigenvalues but the ``rank`` largest, these, and their eigenvectors."""
    c = np.asarray(covariance)
    if form == "separable":
        return packed(c if c.ndim == 1 else np.diag(c))
    c = np.diag(c) if c.ndim == 1 else c
    if form == "full":
        return packed(c[np.tril_indices(len(c))])
    values, vectors = np.linalg.eigh(c)
    rank = min(rank, len(c) - 1)
    return packed(np.concatenate([[values[:-rank].mean()], values[-rank:], vectors[:, -rank:].T.ravel()]))


def root(covariance: bytes, form: CovarianceForm, dimension: int) -> Callable[[FloatArray], FloatArray]:
    """What takes rows of standard normal numbers (n, d) to rows with covariance C: the symmetric root of C.

    Raises `WireError` for bytes of another size.
    """
    if form == "separable":
        sd = np.sqrt(_clear(unpacked(covariance, dimension)))
        return lambda y: np.asarray(y * sd)
    if form == "full":
        c = np.zeros((dimension, dimension))
        c[np.tril_indices(dimension)] = unpacked(covariance, dimension * (dimension + 1) // 2)
        values, vectors = np.linalg.eigh(c)  # reads the lower triangle
        half = (vectors * np.sqrt(_clear(values))) @ vectors.T
        return lambda y: np.asarray(y @ half)
    rank, over = divmod(len(covariance) // 4 - 1, 1 + dimension)
    if over or rank < 1:
        raise WireError(f"{len(covariance)} bytes are no eigenvectors of {dimension} numbers")
    flat = unpacked(covariance, 1 + rank + rank * dimension)
    sd = np.sqrt(_clear(flat[: 1 + rank]))
    v = flat[1 + rank :].reshape(rank, dimension)
    return lambda y: np.asarray(sd[0] * y + ((y @ v.T) * (sd[1:] - sd[0])) @ v)


def _clear(variances: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(variances, LEAST_VARIANCE))


def next_sigma(sigmas: Sequence[Sequence[float]], population: int) -> float:
    """FedBPT's equation 6: 2 sqrt(sum over clients k of S and their iterations j of sigma_kj^2 / (|S| lambda_k)).

    ``sigmas`` are those of S, the clients with the better half of the means; ``population`` is lambda, the same for
    all. It is what the variances of the local steps add up to: with a constant step size it grows by
    2 sqrt(n_iterations / population) a round.
    """
    total = sum(float(np.sum(np.square(mine))) for mine in sigmas)
    return 2.0 * float(np.sqrt(total / (len(sigmas) * population)))


def open_cma(
    mean: FloatArray, sigma: float, population: int, rng: np.random.Generator, *, separable: bool
) -> Any:  # cma has no types
    """A `cma.CMAEvolutionStrategy` at N(mean, sigma^2 I) that draws from ``rng`` and leaves numpy's own alone."""
    cma, csa = _cma()
    options = {
        "popsize": population,
        "randn": lambda *shape: rng.standard_normal(shape),
        "seed": np.nan,  # neither reads nor sets numpy's global seed
        "verbose": -9,
        "CMA_diagonal": separable,
        # What it does else in many dimensions and with small populations has to be told of points of its own making.
        "AdaptSigma": csa,
        "CMA_mirrors": 0,
    }
    return cma.CMAEvolutionStrategy(mean, sigma, options)


def variances_of(search: Any) -> FloatArray:
    """C of a `cma.CMAEvolutionStrategy`: (d, d), or its diagonal (d,) if it is separable."""
    scaling = np.broadcast_to(np.asarray(search.sigma_vec.scaling, dtype=np.float64), (search.N,))
    c = np.asarray(search.sm.covariance_matrix, dtype=np.float64)
    return scaling**2 if c.ndim < 2 else c * np.outer(scaling, scaling)


@contextmanager
def fewer_than_asked() -> Iterator[None]:
    """`cma` warns where it is told of fewer points than it was to be; here that is a client that did not answer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of solutions passed")
        yield


@cache
def _cma() -> tuple[Any, Any]:
    """The package, imported where it is used: it takes most of a second, and warns that it can't plot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not import matplotlib")
        import cma  # type: ignore[import-untyped]
        from cma.sigma_adaptation import CMAAdaptSigmaCSA  # type: ignore[import-untyped]
    return cma, CMAAdaptSigmaCSA
