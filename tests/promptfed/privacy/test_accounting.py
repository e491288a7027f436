"""Epsilons against the closed form of the Gaussian, against another accountant, and by hand."""

from __future__ import annotations

import math

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from promptfed.errors import ConfigError
from promptfed.privacy.accounting import GRAIN, epsilon_of, in_all, noise_multiplier_for, rounded_up


@pytest.mark.parametrize(("n", "noise"), [(1, 1.08), (5, 2.42), (10, 3.42), (20, 4.84)])
def test_noise_for_epsilon_4_over_so_many_rounds(n: int, noise: float) -> None:
    """The values in the project's notes on what votes of a few clients would need."""
    assert noise_multiplier_for(4.0, 1e-5, n_compositions=n) == pytest.approx(noise, abs=0.005)


@pytest.mark.parametrize(("noise", "n"), [(0.7, 1), (1.04, 3), (5.0, 12)])
def test_gaussians_have_the_epsilon_of_the_closed_form(noise: float, n: int) -> None:
    exact = dpa.get_epsilon_gaussian(noise / math.sqrt(n), 1e-5)

    assert epsilon_of(noise, 1e-5, n_compositions=n) == pytest.approx(exact, rel=1e-3)
    assert epsilon_of(noise, 1e-5, n_compositions=n) >= exact - 1e-9


def test_a_poisson_sample_costs_less_than_all_texts_and_less_than_renyi_bounds_say() -> None:
    event = dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(0.05, dpa.GaussianDpEvent(1.0)), 8)
    renyi = RdpAccountant().compose(event).get_epsilon(1e-5)

    sampled = epsilon_of(1.0, 1e-5, n_compositions=8, sampling_rate=0.05)

    assert sampled < renyi < epsilon_of(1.0, 1e-5, n_compositions=8)
    assert sampled > 0.5 * renyi


def test_one_sampled_gaussian_by_hand() -> None:
    """delta(epsilon) of (1-q) N(0, s) + q N(1, s) against N(0, s), integrated on a grid, is at most the delta asked for
    at the epsilon found, and the other way round."""
    q, noise, delta = 0.1, 0.8, 1e-5
    x = np.linspace(-12, 14, 400_001)

    def density(mean: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.exp(-((x - mean) ** 2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    less, more = density(0.0), (1 - q) * density(0.0) + q * density(1.0)

    def most_delta(epsilon: float) -> float:
        step = x[1] - x[0]
        return max(
            float(np.maximum(a - math.exp(epsilon) * b, 0).sum() * step) for a, b in ((more, less), (less, more))
        )

    epsilon = epsilon_of(noise, delta, n_compositions=1, sampling_rate=q)

    assert most_delta(epsilon) <= delta * 1.001
    assert most_delta(epsilon - 0.01) > delta


@pytest.mark.parametrize(("epsilon", "rate"), [(0.5, 1.0), (8.0, 1.0), (2.0, 0.1)])
def test_calibrated_noise_is_enough_and_hardly_more(epsilon: float, rate: float) -> None:
    noise = noise_multiplier_for(epsilon, 1e-5, n_compositions=4, sampling_rate=rate)

    assert epsilon_of(noise, 1e-5, n_compositions=4, sampling_rate=rate) <= epsilon
    assert epsilon_of(noise - 3 * GRAIN, 1e-5, n_compositions=4, sampling_rate=rate) > epsilon


def test_noise_travels_in_32_bits_unchanged() -> None:
    noise = noise_multiplier_for(8.0, 1e-5, n_compositions=3)

    assert float(np.float32(noise)) == noise
    assert rounded_up(math.sqrt(2)) >= math.sqrt(2)
    assert float(np.float32(rounded_up(math.sqrt(2)))) == rounded_up(math.sqrt(2))


def test_the_ends_of_the_scale() -> None:
    assert noise_multiplier_for(math.inf, 1e-5, n_compositions=3) == 0.0
    assert epsilon_of(0.0, 1e-5, n_compositions=1) == math.inf
    assert epsilon_of(1.0, 1e-5, n_compositions=0) == 0.0
    with pytest.raises(ConfigError, match="epsilon"):
        noise_multiplier_for(0.0, 1e-5, n_compositions=1)


def test_releases_add_up() -> None:
    assert in_all([(1.0, 1e-5), (2.5, 1e-5)]) == (3.5, 2e-5)
