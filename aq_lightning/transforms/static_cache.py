"""Scales of keys and values that are the same for all tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.qtensor import grid_of
from aq_lightning.scheme import Grid
from aq_lightning.transforms.base import Factor, Map, SiteStatistics
from aq_lightning.transforms.online import CacheGrid, Operation


class StaticCache(Factor):
    r"""One scale and zero point for each head, or run of its channels, of keys and of values; the last between queries
    and keys, behind whatever multiplies these. Schemes with ``static`` put it there.

    The range of a run is :math:`[e^l \min, e^u \max]` of what calibration has seen; l and u start where the square
    error of what was seen is least, and are learnt with the step size of clipping.

    Args:
        shape: key-value heads and their channels.
        grid: of keys and values.
        storage: dtype in which the checkpoint keeps scales.
    """

    group: ClassVar[Group] = Group.ALL
    online: ClassVar[bool] = True
    rounds: ClassVar[bool] = True
    written_out: ClassVar[bool] = False

    def __init__(self, shape: SiteShape, grid: Grid, storage: torch.dtype) -> None:
        super().__init__()
        self.shape, self.grid, self.storage = shape, grid, storage
        sizes = (2, 2, shape.blocks, grid.groups(shape.size))  # keys and values, both ends, heads, runs
        ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None, None]
        self.register_buffer("reach", ends.expand(sizes).clone())  # of what was seen
        self.ends = nn.Parameter(torch.zeros(sizes, dtype=torch.float64))  # l, u

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays: :meth:`start` follows once all that acts before it has started."""

    @torch.no_grad()
    def start(self, reach: Tensor, fractions: Tensor) -> None:
        """Takes what was seen, and the parts of it to begin with: (2, 2, heads, runs) and (2, heads, runs)."""
        self.reach.copy_(reach)
        self.ends.copy_(fractions.log()[:, None].expand_as(self.ends))

    def forward(self, dtype: torch.dtype) -> Map:
        low, high = (self.reach * self.ends.exp()).unbind(1)  # (2, heads, runs) each
        step, zero = (each.to(dtype) for each in grid_of(low, high, self.grid, self.storage))
        tensors = {"key_step": step[0], "key_zero": zero[0], "value_step": step[1], "value_zero": zero[1]}
        return Map(_same, _same, online=(tensors,))

    def operation(self) -> Operation:
        empty = torch.empty(self.reach.shape[2:], dtype=torch.float64, device="meta")
        return CacheGrid(**dict.fromkeys(CacheGrid.names, empty))

    def condition(self) -> Tensor:
        return torch.ones((), dtype=torch.float64)


def _same(x: Tensor) -> Tensor:
    return x
