"""The query–key transform that fits into the gains of query and key norms."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics
from aq_lightning.transforms.rope_pair import rotary_pairs
from aq_lightning.transforms.settled import settled


class PairScale(Factor):
    r"""A positive factor on each rotary pair ``(i, i + rotary / 2)``, and on each channel that is not turned.

    :class:`RopePair` without its angles, and so a diagonal matrix that commutes with rotary embedding: a gain can hold
    it. Trained as a logarithm, invertible at every step.

    Args:
        shape: heads, channels of each, and how many of them rotary embedding turns, an even number.
    """

    group: ClassVar[Group] = Group.ROPE_RADIUS

    def __init__(self, shape: SiteShape) -> None:
        super().__init__()
        self.shape = shape
        self.pairs = rotary_pairs(shape)
        self.log_radius = nn.Parameter(torch.zeros(shape.blocks, shape.size - self.pairs, dtype=torch.float64))

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays at 1."""

    def forward(self, dtype: torch.dtype) -> Map:
        radius = self.log_radius.exp()  # (blocks, pairs + free)
        scale = settled(torch.cat([radius[:, : self.pairs], radius], dim=1)[:, None], dtype)  # (blocks, 1, size)
        split, join = self.shape.split, self.shape.join
        return Map(lambda x: join(split(x) / scale), lambda w: join(split(w) * scale), diagonal=True)

    def condition(self) -> Tensor:
        return (self.log_radius.detach().amax(1) - self.log_radius.detach().amin(1)).exp().max()
