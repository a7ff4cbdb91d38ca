"""Ranges chosen by search, not trained."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.quantizers.base import WeightQuantizer
from aq_lightning.quantizers.search import GridSearch
from aq_lightning.scheme import Grid


class SearchedRange(WeightQuantizer):
    """Each group's range where :class:`GridSearch` finds it: for the weight before training, and again before it is
    rounded for good by a rounder that looks at activations.

    Args:
        grid, shape, storage: as in :class:`WeightQuantizer`.
        search: what is searched.
    """

    def __init__(
        self, grid: Grid, shape: tuple[int, int], storage: torch.dtype, search: GridSearch = GridSearch()
    ) -> None:
        super().__init__(grid, shape, storage, search)
        self.register_buffer("low", torch.ones(self.grouped[:2]))  # (out, groups)
        self.register_buffer("high", torch.ones(self.grouped[:2]))  # (out, groups)

    def fractions(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def start(self, low: Tensor, high: Tensor) -> None:
        self.low.copy_(low)
        self.high.copy_(high)
