"""``fedbpt``: clients evolve a soft prompt on their own texts, the server evolves over what they came to.

FedBPT (Sun et al., ICML 2024, arXiv 2310.01467): a soft prompt is A z + p0 for an intrinsic vector z, and CMA-ES finds
z without gradients (BBT: Sun et al., ICML 2022, arXiv 2201.03514). The clients' means are one population of a CMA-ES at
the server, which learns from them where to go and in which directions to look; its step size comes of the clients'
(their equation 6), whose own covariances stay where they are.

What differs from the paper, and why: in docs/methods/fedbpt.md. Above all, means are ranked by their scores at *all*
clients (``cross_evaluate``), since losses that clients report are on different texts, and are whatever a client says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from promptfed.messages.methods import CovarianceForm
from promptfed.strategies.base import Federation
from promptfed.strategies.evolution import Distribution, fewer_than_asked, next_sigma, open_cma, pack, variances_of
from promptfed.strategies.soft_search import Local, Server, SoftSearch

# Bounds of the step size, in units of the first. Equation 6 grows it without end where clients don't lower theirs, and
# the first makes vectors as large as those of tokens.
SIGMA_BOUNDS = (0.05, 1.0)
# A CMA-ES is told of no fewer.
LEAST_POPULATION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FedBPT(SoftSearch):
    """Federated black-box prompt tuning. ``rank``: eigenvectors that travel of a ``low_rank`` covariance."""

    form: CovarianceForm = "separable"
    rank: Annotated[int, Field(ge=1)] = 2
    cross_evaluate: bool = True

    name: ClassVar[str] = "fedbpt"
    paper: ClassVar[str] = "FedBPT (Sun et al., ICML 2024, arXiv 2310.01467)"

    @property
    def scores_means(self) -> bool:
        return self.cross_evaluate

    def server(self, federation: Federation) -> Server:
        return CmaServer(self, federation.rng(14))


class CmaServer:
    """CMA-ES over the clients' means."""

    def __init__(self, options: FedBPT, rng: np.random.Generator) -> None:
        self._options = options
        population = max(options.clients_per_round, LEAST_POPULATION)
        separable = options.form == "separable"
        self.search = open_cma(np.zeros(options.dimension), options.sigma, population, rng, separable=separable)
        self.distribution = self._present()

    def _present(self) -> Distribution:
        form, search = self._options.form, self.search
        covariance = pack(variances_of(search), form, self._options.rank)
        return Distribution(mean=search.mean.copy(), sigma=float(search.sigma), form=form, covariance=covariance)

    def tell(self, found: Sequence[Local], losses: Sequence[float], here: float) -> None:
        """Take one step of CMA-ES with the means as its population. They were not drawn from the server's
        distribution, so those far from it are drawn in (Hansen, arXiv 1110.4181).

        Fewer than it takes a step for say nothing of directions: then the mean goes to the best of them, if that was
        scored beside the present one and is better.
        """
        order = np.argsort(losses, kind="stable")
        half = [found[i].sigmas for i in order[: (len(order) + 1) // 2]]
        low, high = (bound * self._options.sigma for bound in SIGMA_BOUNDS)
        if len(found) < max(LEAST_POPULATION, self.search.sp.weights.mu):
            if losses[order[0]] < here or not self._options.cross_evaluate:
                self.search.mean = found[order[0]].mean.copy()
        else:
            self.search.ask()  # it wants to be asked before it is told
            with fewer_than_asked():
                self.search.tell([one.mean.copy() for one in found], list(losses))
        self.search.sigma = min(max(next_sigma(half, self._options.population), low), high)
        self.distribution = self._present()
