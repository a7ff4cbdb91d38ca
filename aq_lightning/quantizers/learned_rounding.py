"""Learned rounding (SignRound, arXiv 2309.05516; AutoRound is its release)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.quantizers.base import WeightQuantizer
from aq_lightning.quantizers.search import GridSearch
from aq_lightning.scheme import Grid


class LearnedRounding(WeightQuantizer):
    r"""Each weight rounded up or down as training finds best, and each group's range shrunk by two fractions.

    .. math:: u = \mathrm{clamp}(\mathrm{round}(w / s + v) + z), \qquad v \in [-ρ, ρ],

    with ρ = ½ (either neighbour) in the paper, and s and z of the range :math:`[β \min w, α \max w]` (its eq. 3 and 4).
    All start as round-to-nearest: v at 0, α and β at 1. The gradient reaches v straight through the rounding, times s.

    Args:
        grid, shape, storage: as in :class:`WeightQuantizer`.
        search: where α and β start instead.
        reach: ρ; above ½ a weight may go further than its neighbours.

    Raises:
        RequestError: ρ is not above 0.
    """

    def __init__(
        self,
        grid: Grid,
        shape: tuple[int, int],
        storage: torch.dtype,
        search: GridSearch | None = None,
        reach: float = 0.5,
    ) -> None:
        super().__init__(grid, shape, storage, search)
        if not 0 < reach < math.inf:
            raise RequestError(f"Learned rounding reaches some way, got reach {reach}: leave it at 0.5, or try 1.")
        self.reach = reach
        self.lower = nn.Parameter(torch.ones(self.grouped[:2]))  # β, (out, groups)
        self.upper = nn.Parameter(torch.ones(self.grouped[:2]))  # α, (out, groups)
        self.offset = nn.Parameter(torch.zeros(shape))  # v, (out, in)

    def fractions(self) -> tuple[Tensor, Tensor]:
        return self.lower, self.upper

    def start(self, low: Tensor, high: Tensor) -> None:
        self.lower.data.copy_(low)
        self.upper.data.copy_(high)

    @torch.no_grad()
    def project(self) -> None:
        self.offset.clamp_(-self.reach, self.reach)
        self.lower.clamp_(0, 1)
        self.upper.clamp_(0, 1)
