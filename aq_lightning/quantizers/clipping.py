"""Learnable weight clipping (OmniQuant, arXiv 2308.13137; AffineQuant keeps it)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aq_lightning.quantizers.base import WeightQuantizer
from aq_lightning.scheme import Grid


class LearnedClipping(WeightQuantizer):
    r"""Each group's range shrunk by two trained fractions, :math:`σ(l) \min W` and :math:`σ(u) \max W`.

    Args:
        grid, shape, storage: as in :class:`WeightQuantizer`.
        start: l and u before training; σ(4) = 0.982, a hair inside the whole range.
    """

    def __init__(self, grid: Grid, shape: tuple[int, int], storage: torch.dtype, start: float = 4.0) -> None:
        super().__init__(grid, shape, storage)
        self.lower = nn.Parameter(torch.full(self.grouped[:2], start))  # (out, groups)
        self.upper = nn.Parameter(torch.full(self.grouped[:2], start))  # (out, groups)

    def fractions(self) -> tuple[Tensor, Tensor]:
        return self.lower.sigmoid(), self.upper.sigmoid()
