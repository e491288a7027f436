"""Search distributions on the wire, the step size of equation 6, and CMA-ES as `cma` does it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from promptfed.errors import WireError
from promptfed.messages.methods import CovarianceForm, unpacked
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.evolution import next_sigma, open_cma, pack, root, variances_of
from promptfed.strategies.fedavg_bbt import AveragingServer
from promptfed.strategies.fedbpt import CmaServer, FedBPT
from promptfed.strategies.soft_search import Local
from promptfed.types import FloatArray

PROMPT = PromptTemplate(text="{text}", words=("a", "b"))


def local(mean: Any, sigmas: tuple[float, ...] = (1.0, 1.0), weight: int = 1) -> Local:
    return Local(mean=np.asarray(mean, dtype=float), prompt=PROMPT, fitness=1.0, sigmas=sigmas, weight=weight)


def a_covariance(d: int, seed: int = 0) -> FloatArray:
    x = np.random.default_rng(seed).standard_normal((d, 2 * d))
    return np.asarray(x @ x.T / (2 * d))


# ---------------------------------------------------------------- how a covariance travels


def test_covariances_on_the_wire_by_hand() -> None:
    c = np.array([[4.0, 1.0], [1.0, 2.0]])

    assert unpacked(pack(c, "full", 1), 3).tolist() == [4.0, 1.0, 2.0]
    assert unpacked(pack(c, "separable", 1), 2).tolist() == [4.0, 2.0]
    assert unpacked(pack(np.diag([1.0, 9.0, 3.0]), "low_rank", 1), 5) == pytest.approx([2.0, 9.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("form", ["full", "separable", "low_rank"])
def test_the_root_gives_the_covariance_back(form: CovarianceForm) -> None:
    d = 5
    c = a_covariance(d)
    values, vectors = np.linalg.eigh(c)
    near = {
        "full": c,
        "separable": np.diag(np.diag(c)),
        "low_rank": vectors @ np.diag([values[:3].mean()] * 3 + [*values[3:]]) @ vectors.T,
    }

    half = root(pack(c, form, 2), form, d)(np.eye(d))

    assert half.T @ half == pytest.approx(near[form], abs=1e-5)
    assert half == pytest.approx(half.T, abs=1e-6)


@pytest.mark.parametrize("form", ["full", "separable", "low_rank"])
def test_bytes_of_another_size_are_refused(form: CovarianceForm) -> None:
    whole = pack(a_covariance(5), form, 2)

    for broken in (whole[:-4], whole + whole[:4], b""):
        with pytest.raises(WireError):
            root(broken, form, 5)


# ---------------------------------------------------------------- the step size


def test_the_step_size_of_equation_6_by_hand() -> None:
    # Two clients, three iterations each, a population of 6: 2 sqrt((1 + 4 + 4 + 1 + 1 + 1) / (2 * 6)) = 2.
    assert next_sigma([(1.0, 2.0, 2.0), (1.0, 1.0, 1.0)], 6) == pytest.approx(2.0)


def test_a_constant_step_size_grows_by_twice_the_root_of_iterations_over_population() -> None:
    assert next_sigma([(0.5,) * 8] * 3, 5) == pytest.approx(0.5 * 2 * np.sqrt(8 / 5))


def test_only_the_better_half_has_a_say_and_within_bounds() -> None:
    server = CmaServer(FedBPT(dimension=2, population=8, clients_per_round=4), np.random.default_rng(0))
    found = [local(np.eye(2)[i % 2], sigmas=(s, s)) for i, s in enumerate((0.5, 4.0, 0.5, 4.0))]

    server.tell(found, [1.0, 2.0, 1.5, 3.0], 9.0)

    assert server.distribution.sigma == pytest.approx(0.5)  # 2 sqrt(4 * 0.25 / (2 * 8)), of the first and the third
    server.tell(found, [2.0, 1.0, 3.0, 1.5], 9.0)
    assert server.distribution.sigma == 1.0  # not 4: no wider than the first


# ---------------------------------------------------------------- the server's step


def plain_cma(d: int, population: int, *, separable: bool) -> Any:
    """As anybody would open it who wants no point of its own making."""
    rng = np.random.default_rng(5)
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not import matplotlib")
        import cma
        from cma.sigma_adaptation import CMAAdaptSigmaCSA
    options = {
        "popsize": population,
        "seed": np.nan,
        "randn": lambda *shape: rng.standard_normal(shape),
        "verbose": -9,
        "CMA_diagonal": separable,
        "AdaptSigma": CMAAdaptSigmaCSA,
        "CMA_mirrors": 0,
    }
    return cma.CMAEvolutionStrategy(np.zeros(d), 1.0, options)


@pytest.mark.parametrize("form", ["full", "separable", "low_rank"])
@pytest.mark.parametrize("n", [4, 3])
def test_a_round_is_one_step_of_a_plain_cma_run(form: CovarianceForm, n: int) -> None:
    """The oracle: told the same population and losses, in every round, it has the same mean and covariance."""
    d = 6
    server = CmaServer(FedBPT(dimension=d, form=form, rank=d - 1, clients_per_round=n), np.random.default_rng(1))
    plain = plain_cma(d, n, separable=form == "separable")
    rng = np.random.default_rng(2)
    for _ in range(5):
        means = 2.0 * rng.standard_normal((n, d))
        losses = list(((means - 1.0) ** 2).sum(axis=1))

        server.tell([local(m) for m in means], losses, 0.0)
        plain.ask()
        plain.tell([m.copy() for m in means], losses)

        start = server.distribution
        half = root(start.covariance, form, d)(np.eye(d))
        assert start.mean == pytest.approx(plain.mean)
        assert half.T @ half == pytest.approx(covariance_of(plain), abs=1e-5)
        plain.sigma = start.sigma  # the only thing that is not CMA-ES's own


def covariance_of(search: Any) -> FloatArray:
    c = variances_of(search)
    return np.diag(c) if c.ndim == 1 else c


def test_fewer_answers_than_clients_asked_are_still_a_step() -> None:
    server = CmaServer(FedBPT(dimension=3, clients_per_round=6), np.random.default_rng(1))

    server.tell([local(m) for m in 0.1 * np.eye(3)], [1.0, 2.0, 3.0], 0.0)

    mean = server.distribution.mean
    assert mean[0] > mean[1] > mean[2] > 0


def test_two_means_are_no_population_the_better_one_is_taken_if_it_is_better_than_what_there_is() -> None:
    def told(here: float, **options: Any) -> list[float]:
        server = CmaServer(FedBPT(dimension=2, **options), np.random.default_rng(1))
        server.tell([local([1.0, 0.0]), local([0.0, 1.0])], [3.0, 2.0], here)
        return server.distribution.mean.tolist()

    assert told(here=2.5) == [0.0, 1.0]
    assert told(here=1.5) == [0.0, 0.0]
    assert told(here=1.5, cross_evaluate=False) == [0.0, 1.0]  # losses on other texts can't be compared


def test_means_are_averaged_by_numbers_of_texts() -> None:
    server = AveragingServer(2, sigma=0.5)

    server.tell([local([1.0, 0.0], weight=30), local([0.0, 4.0], weight=10)], [9.0, 0.0], 0.0)

    start = server.distribution
    assert start.mean.tolist() == [0.75, 1.0]
    assert (start.sigma, start.form) == (0.5, "separable")
    assert unpacked(start.covariance, 2).tolist() == [1.0, 1.0]


# ---------------------------------------------------------------- how cma is opened


@pytest.mark.parametrize("dimension", [4, 300])
@pytest.mark.parametrize("separable", [True, False])
def test_it_neither_reads_nor_sets_numpys_own_generator(dimension: int, separable: bool) -> None:
    def run() -> list[float]:
        search = open_cma(np.zeros(dimension), 1.0, 5, np.random.default_rng(3), separable=separable)
        for _ in range(3):
            ys = search.ask()
            search.tell(ys, [float(((y - 1) ** 2).sum()) for y in ys])
        mean: list[float] = search.mean.tolist()
        return mean

    np.random.seed(1)
    first = run()
    after = np.random.random()
    np.random.seed(1)
    untouched = np.random.random()

    assert after == untouched
    assert run() == first
