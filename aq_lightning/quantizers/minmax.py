"""The whole range of each group: round-to-nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.quantizers.base import WeightQuantizer
from aq_lightning.scheme import Grid


class MinMax(WeightQuantizer):
    """Least and greatest weight of each group; nothing to train."""

    def __init__(self, grid: Grid, shape: tuple[int, int], storage: torch.dtype) -> None:
        super().__init__(grid, shape, storage)
        self.register_buffer("whole", torch.ones(self.grouped[:2]), persistent=False)  # (out, groups)

    def fractions(self) -> tuple[Tensor, Tensor]:
        return self.whole, self.whole
