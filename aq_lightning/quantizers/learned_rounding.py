"""Learned rounding (SignRound, arXiv 2309.05516; AutoRound is its release)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aq_lightning.quantizers.base import WeightQuantizer
from aq_lightning.quantizers.search import GridSearch
from aq_lightning.scheme import Grid


class LearnedRounding(WeightQuantizer):
    r"""Each weight rounded up or down as training finds best, and each group's range shrunk by two fractions.

    .. math:: u = \mathrm{clamp}(\mathrm{round}(w / s + v) + z), \qquad v \in [-½, ½],

    with s and z of the range :math:`[β \min w, α \max w]` (the paper's eq. 3 and 4). All start as round-to-nearest:
    v at 0, α and β at 1. The gradient reaches v straight through the rounding, times s.

    Args:
        grid, shape, storage: as in :class:`WeightQuantizer`.
        search: where α and β start instead.
    """

    def __init__(
        self, grid: Grid, shape: tuple[int, int], storage: torch.dtype, search: GridSearch | None = None
    ) -> None:
        super().__init__(grid, shape, storage, search)
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
        self.offset.clamp_(-0.5, 0.5)
        self.lower.clamp_(0, 1)
        self.upper.clamp_(0, 1)
