"""Learned clipping of activations, shared by all that read a site, and of keys and values."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics
from aq_lightning.transforms.online import CacheClip, Operation, TokenClip


class Clip(Factor):
    r"""Each token cut to the fractions σ(l) of its least and σ(u) of its greatest channel before it is quantized.

    A dynamic quantizer's scale then is that of the clipped range (FlatQuant's and OmniQuant's learned activation
    clipping); cutting first makes one operation serve all consumers of a site. The last factor of a transform; no
    equivalence, but a part of rounding, and so only where activations are rounded. Between queries and keys it cuts
    keys and values, with fractions for each, per head.

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
        value = torch.full((2, 2) if shape.dual else (2,), start, dtype=torch.float64).logit()
        self.ends = nn.Parameter(value, requires_grad=trained)  # l, u; between queries and keys a row of each

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays where it starts."""

    def forward(self, dtype: torch.dtype) -> Map:
        fractions = self.ends.sigmoid().to(dtype)
        tensors = {"key_clip": fractions[0], "value_clip": fractions[1]} if self.shape.dual else {"clip": fractions}
        return Map(_same, _same, online=(tensors,))

    def operation(self) -> Operation:
        empty = torch.empty(2, dtype=torch.float64, device="meta")
        return CacheClip(key_clip=empty, value_clip=empty) if self.shape.dual else TokenClip(clip=empty)

    def condition(self) -> Tensor:
        return torch.ones((), dtype=torch.float64)


def _same(x: Tensor) -> Tensor:
    return x
