"""What a method let out under differential privacy, and what that amounts to in (epsilon, delta).

A mechanism is told as events of the `dp-accounting` library and composed by its privacy loss distributions (Koskela et
al., AISTATS 2020, arXiv 1906.03049), which err on the safe side: Gaussian noise on a vector, as often as it was let
out, each time of the texts that a Poisson sample drew. Neighbours are two data sets of which one has a text more.

A sampling rate below 1 may be claimed only where each text was drawn by a coin of its own that nobody else knows, and
where a text more changes nothing but what is made of the draws that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from promptfed.errors import ConfigError

# Width of the bins of a privacy loss distribution: a tenth of it changes an epsilon of 8 by less than 0.001.
BIN = 1e-3
# Noise is rounded up to a multiple of this, which the wire's 32 bits hold.
GRAIN = 1 / 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What one client let out through ``mechanism``, ``n_compositions`` times, ``n_outputs`` numbers in all.

    ``noise_multiplier`` is the standard deviation over the L2 sensitivity to one ``unit``. ``not_covered``: what
    else left in the same run and is exact.
    """

    mechanism: str
    unit: Literal["record", "client"]
    noise_multiplier: float
    n_compositions: int
    sampling_rate: float
    epsilon: float
    delta: float
    n_outputs: int
    not_covered: str


def event(noise_multiplier: float, n_compositions: int, sampling_rate: float = 1.0) -> Any:
    """The mechanism as a `dp_accounting.DpEvent`. (n Gaussians are one, of 1/sqrt(n) the noise.)"""
    import dp_accounting as dpa  # a third of a second, which a method without noise need not wait for

    if sampling_rate == 1.0:
        return dpa.GaussianDpEvent(noise_multiplier / math.sqrt(n_compositions))
    one = dpa.PoissonSampledDpEvent(sampling_rate, dpa.GaussianDpEvent(noise_multiplier))
    return dpa.SelfComposedDpEvent(one, n_compositions)


def epsilon_of(noise_multiplier: float, delta: float, *, n_compositions: int, sampling_rate: float = 1.0) -> float:
    """The epsilon at ``delta`` of so many releases with that noise; infinite without noise, 0 for no release."""
    if not n_compositions:
        return 0.0
    if not noise_multiplier:
        return math.inf
    accountant = _accountant().compose(event(noise_multiplier, n_compositions, sampling_rate))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def noise_multiplier_for(epsilon: float, delta: float, *, n_compositions: int, sampling_rate: float = 1.0) -> float:
    """The least noise, in multiples of `GRAIN`, with which so many releases stay within (epsilon, delta); 0 for an
    infinite epsilon. Raises `ConfigError` for an epsilon or delta out of range."""
    if not epsilon > 0 or not 0 < delta < 1:
        raise ConfigError(f"epsilon has to be positive and delta between 0 and 1; got {epsilon:g} and {delta:g}")
    if math.isinf(epsilon) or not n_compositions:
        return 0.0
    import dp_accounting as dpa

    def too_little(noise: float) -> bool:
        return epsilon_of(noise, delta, n_compositions=n_compositions, sampling_rate=sampling_rate) > epsilon

    most = 1.0  # halved or doubled to a bracket from above: little noise takes long to account for
    while too_little(most):
        most *= 2
    while not too_little(most / 2):
        most /= 2
    found = dpa.calibrate_dp_mechanism(
        _accountant,
        lambda noise: event(noise, n_compositions, sampling_rate),
        epsilon,
        delta,
        bracket_interval=dpa.ExplicitBracketInterval(most / 2, most),
        tol=GRAIN,
    )
    return rounded_up(float(found))


def rounded_up(noise: float) -> float:
    """``noise``, or a little more, as a number that travels in 32 bits."""
    return math.ceil(noise / GRAIN) * GRAIN


def in_all(releases: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """What several (epsilon, delta) of the same unit amount to at most, by basic composition."""
    pairs = list(releases)
    return sum(epsilon for epsilon, _ in pairs), sum(delta for _, delta in pairs)


def _accountant() -> Any:
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(value_discretization_interval=BIN)
