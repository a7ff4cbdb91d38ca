"""Learnable weight clipping (OmniQuant, arXiv 2308.13137; AffineQuant keeps it)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aq_lightning.quantizers.base import WeightQuantizer
from aq_lightning.quantizers.search import GridSearch
from aq_lightning.scheme import Grid


class LearnedClipping(WeightQuantizer):
    r"""Each group's range shrunk by two trained fractions, :math:`σ(l) \min W` and :math:`σ(u) \max W`.

    Args:
        grid, shape, storage: as in :class:`WeightQuantizer`.
        start: l and u before training; σ(4) = 0.982, a hair inside the whole range.
        search: where to start instead, but no wider than that.
    """

    def __init__(
        self,
        grid: Grid,
        shape: tuple[int, int],
        storage: torch.dtype,
        start: float = 4.0,
        search: GridSearch | None = None,
    ) -> None:
        super().__init__(grid, shape, storage, search)
        self.widest = start
        self.lower = nn.Parameter(torch.full(self.grouped[:2], start))  # (out, groups)
        self.upper = nn.Parameter(torch.full(self.grouped[:2], start))  # (out, groups)

    def fractions(self) -> tuple[Tensor, Tensor]:
        return self.lower.sigmoid(), self.upper.sigmoid()

    def start(self, low: Tensor, high: Tensor) -> None:
        self.lower.data.copy_(low.logit().clamp(max=self.widest))
        self.upper.data.copy_(high.logit().clamp(max=self.widest))
