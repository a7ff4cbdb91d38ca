"""Learned clipping of activations, shared by all that read a site."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics
from aq_lightning.transforms.online import Operation, TokenClip


class Clip(Factor):
    r"""Each token cut to the fractions σ(l) of its least and σ(u) of its greatest channel before it is quantized.

    A dynamic quantizer's scale then is that of the clipped range (FlatQuant's and OmniQuant's learned activation
    clipping); cutting first makes one operation serve all consumers of a site. The last factor of a transform; no
    equivalence, but a part of rounding, and so only where activations are rounded.

    Args:
        shape: of the site.
        start: fraction before training, in (0, 1]; σ(4) = 0.982 is FlatQuant's.
        trained: whether the fractions are learnt, with the step size of clipping.
    """

    group: ClassVar[Group] = Group.ALL
    online: ClassVar[bool] = True
    rounds: ClassVar[bool] = True
    written_out: ClassVar[bool] = False

    def __init__(self, shape: SiteShape, start: float = 0.982, trained: bool = True) -> None:
        super().__init__()
        if not 0 < start < 1:
            raise RequestError(f"Clip.start lies in (0, 1), got {start}: 0.982 is a hair inside the whole range.")
        self.shape = shape
        value = torch.tensor([start, start], dtype=torch.float64).logit()
        self.ends = nn.Parameter(value, requires_grad=trained)  # l, u

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays where it starts."""

    def forward(self, dtype: torch.dtype) -> Map:
        return Map(_same, _same, online=({"clip": self.ends.sigmoid().to(dtype)},))

    def operation(self) -> Operation:
        return TokenClip(clip=torch.empty_like(self.ends, device="meta"))

    def condition(self) -> Tensor:
        return torch.ones((), dtype=torch.float64)


def _same(x: Tensor) -> Tensor:
    return x
