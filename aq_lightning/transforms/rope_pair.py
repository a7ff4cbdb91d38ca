"""The query–key transform that commutes with rotary position embedding."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics
from aq_lightning.transforms.settled import settled


def rotary_pairs(shape: SiteShape) -> int:
    """Rotary pairs of a head.

    Raises:
        RequestError: an odd number of channels is turned.
    """
    turned = shape.size if shape.rotary is None else shape.rotary
    if turned % 2:
        raise RequestError(
            f"Rotary pairs need an even number of turned channels, got {turned} of a head of {shape.size}: "
            "leave RopePair and PairScale out."
        )
    return turned // 2


class RopePair(Factor):
    r"""A complex factor :math:`a = r e^{iφ}` on each rotary pair ``(i, i + rotary / 2)`` of a key-value head.

    Rotary embedding rotates the pair, read as a complex number, by an angle that depends on the position; complex
    factors commute with it, and nothing else does. Queries become :math:`q / a`, keys :math:`k \bar a`, and
    :math:`\mathrm{Re}(q \bar k)` does not change. Trained as ``log r`` and ``φ``, invertible at every step. Channels
    that rotary embedding leaves alone get a positive factor each.

    Args:
        shape: key-value heads, channels of each, and how many of them rotary embedding turns, an even number.
    """

    group: ClassVar[Group] = Group.ROPE

    def __init__(self, shape: SiteShape) -> None:
        super().__init__()
        self.shape = shape
        self.pairs = rotary_pairs(shape)
        free = shape.size - 2 * self.pairs
        self.log_radius = nn.Parameter(torch.zeros(shape.blocks, self.pairs + free, dtype=torch.float64))
        self.angle = nn.Parameter(torch.zeros(shape.blocks, self.pairs, dtype=torch.float64))

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays at 1."""

    def forward(self, dtype: torch.dtype) -> Map:
        real, imaginary = self.angle.cos(), -self.angle.sin()  # e^{-iφ}, (blocks, pairs) each
        radius, free = self.log_radius.exp().split((self.pairs, self.shape.size - 2 * self.pairs), dim=1)
        inverse = [settled(part, dtype) for part in (real / radius, imaginary / radius, 1 / free)]  # 1 / a
        adjoint = [settled(part, dtype) for part in (real * radius, imaginary * radius, free)]  # conj(a)
        return Map(lambda x: self._times(x, *inverse), lambda w: self._times(w, *adjoint))

    def _times(self, x: Tensor, real: Tensor, imaginary: Tensor, free: Tensor) -> Tensor:
        """Multiplies each pair of (…, blocks · group · size) by its complex factor, (blocks, pairs)."""
        real, imaginary, free = real[:, None], imaginary[:, None], free[:, None]  # (blocks, 1, pairs or free)
        first, second, rest = self.shape.split(x).split((self.pairs, self.pairs, free.shape[-1]), dim=-1)
        product = (first * real - second * imaginary, first * imaginary + second * real, rest * free)
        return self.shape.join(torch.cat(product, dim=-1))

    def condition(self) -> Tensor:
        return (self.log_radius.detach().amax(1) - self.log_radius.detach().amin(1)).exp().max()
