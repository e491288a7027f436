"""``fedavg_bbt``: clients evolve a soft prompt on their own texts, the server averages what they came to.

BBT (Sun et al., ICML 2022, arXiv 2201.03514) under FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629): the
ancestor that FedBPT (arXiv 2310.01467) compares itself with. Each round's searches start at the average of the last
ones' means, weighed by numbers of texts, with the step size and the covariance of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from promptfed.strategies.base import Federation
from promptfed.strategies.evolution import Distribution, pack
from promptfed.strategies.soft_search import Local, Server, SoftSearch


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvgBBT(SoftSearch):
    """Federated averaging of black-box tuning."""

    name: ClassVar[str] = "fedavg_bbt"
    paper: ClassVar[str] = "BBT (Sun et al., ICML 2022, arXiv 2201.03514) with FedAvg (arXiv 1602.05629)"

    @property
    def scores_means(self) -> bool:
        return False

    def server(self, _: Federation) -> Server:
        return AveragingServer(self.dimension, self.sigma)


class AveragingServer:
    """The average of the clients' means."""

    def __init__(self, dimension: int, sigma: float) -> None:
        self.distribution = Distribution(
            mean=np.zeros(dimension),
            sigma=sigma,
            form="separable",
            covariance=pack(np.ones(dimension), "separable", 0),
        )

    def tell(self, found: Sequence[Local], _losses: Sequence[float], _here: float) -> None:
        mean = np.average([one.mean for one in found], axis=0, weights=[one.weight for one in found])
        start = self.distribution
        self.distribution = Distribution(mean=mean, sigma=start.sigma, form=start.form, covariance=start.covariance)
