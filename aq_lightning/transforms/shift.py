"""Translation of a site's activations."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics


class Shift(Factor):
    r"""``x' = x − δ`` with trainable δ.

    A producer that can hold a bias takes −δ in weight–activation schemes. Elsewhere the activation stays as it is and
    δ acts only through the consumers' biases, :math:`b' = b + (W' - \hat W') δ A^{-1}`: the same function of a
    weight-only scheme, with a stock norm.

    Args:
        shape: channels of the site.
        start: δ before training: 0, the mean activation, or the middle of its range (Outlier Suppression+).
    """

    group: ClassVar[Group] = Group.SHIFT

    def __init__(self, shape: SiteShape, start: Literal["zero", "mean", "middle"] = "mean") -> None:
        super().__init__()
        self.start = start
        self.shape = shape
        self.delta = nn.Parameter(torch.zeros(shape.blocks, shape.size, dtype=torch.float64))

    def initialize(self, statistics: SiteStatistics) -> None:
        if self.start == "mean":
            self.delta.data.copy_(statistics.mean)
        elif self.start == "middle":
            self.delta.data.copy_((statistics.low + statistics.high) / 2)

    def forward(self, dtype: torch.dtype) -> Map:
        return Map(lambda x: x, lambda w: w, lambda channels: self._over(channels).to(dtype), diagonal=True)

    def _over(self, channels: int) -> Tensor:
        """δ repeated for each member of the query group, (channels)."""
        repeated = self.delta[:, None].expand(-1, channels // self.shape.channels, -1)  # (blocks, group, size)
        return self.shape.join(repeated)

    def condition(self) -> Tensor:
        return torch.ones((), dtype=torch.float64)
