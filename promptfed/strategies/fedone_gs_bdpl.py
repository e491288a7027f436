"""``fedone_gs_bdpl``: `fedone_bdpl` with prompts drawn through the Gumbel-softmax.

GS-BDPL, the second of the two methods that FedOne federates (Wang et al., ICML 2025), with the relaxation of Jang et
al. (ICLR 2017, arXiv 1611.01144): each prompt is drawn from a noised policy of its own,

    p = softmax((log a + g) / tau),   d log P(j) / d log a = (onehot_j - p) / tau,   g Gumbel                 (1)

so prompts are drawn more evenly than a says (the more, the larger tau; with tau near 0 as a says, but then hardly any
draw has a gradient), and an n-gram that the noise made likely is moved less for having been drawn. What is tuned is log
a: the published gradient, by a, divides by it. All the rest is `fedone_bdpl`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from promptfed.strategies.fedone_bdpl import FedOneBDPL


@dataclass(frozen=True, slots=True, kw_only=True)
class FedOneGSBDPL(FedOneBDPL):
    """Options of `FedOneBDPL`, and ``temperature``, tau in (1)."""

    temperature: Annotated[float, Field(gt=0)] = 1.0

    name: ClassVar[str] = "fedone_gs_bdpl"

    @property
    def estimator(self) -> tuple[Literal["reinforce", "gumbel"], float]:
        return "gumbel", self.temperature
