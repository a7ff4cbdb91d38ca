"""The query–key transform that commutes with rotary position embedding."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics


class RopePair(Factor):
    r"""A complex factor :math:`a = r e^{iφ}` on each rotary pair ``(i, i + size / 2)`` of a key-value head.

    Rotary embedding rotates the pair, read as a complex number, by an angle that depends on the position; complex
    factors commute with it, and nothing else does. Queries become :math:`q / a`, keys :math:`k \bar a`, and
    :math:`\mathrm{Re}(q \bar k)` does not change. Trained as ``log r`` and ``φ``, invertible at every step.

    Args:
        shape: key-value heads and channels of each, an even number.
    """

    group: ClassVar[Group] = Group.ROPE

    def __init__(self, shape: SiteShape) -> None:
        super().__init__()
        if shape.size % 2:
            raise RequestError(f"Rotary pairs need an even head size, got {shape.size}: leave RopePair out.")
        self.shape = shape
        self.log_radius = nn.Parameter(torch.zeros(shape.blocks, shape.size // 2, dtype=torch.float64))
        self.angle = nn.Parameter(torch.zeros(shape.blocks, shape.size // 2, dtype=torch.float64))

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays at 1."""

    def forward(self, dtype: torch.dtype) -> Map:
        real, imaginary = self.angle.cos(), -self.angle.sin()  # e^{-iφ}, (blocks, pairs) each
        radius = self.log_radius.exp()
        inverse = ((real / radius).to(dtype), (imaginary / radius).to(dtype))  # 1 / a
        adjoint = ((real * radius).to(dtype), (imaginary * radius).to(dtype))  # conj(a)
        return Map(lambda x: self._times(x, *inverse), lambda w: self._times(w, *adjoint))

    def _times(self, x: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
        """Multiplies each pair of (…, blocks · group · size) by its complex factor, (blocks, pairs)."""
        real, imaginary = real[:, None], imaginary[:, None]  # (blocks, 1, pairs)
        first, second = self.shape.split(x).chunk(2, dim=-1)  # (…, blocks, group, pairs) each
        product = (first * real - second * imaginary, first * imaginary + second * real)
        return self.shape.join(torch.cat(product, dim=-1))

    def condition(self) -> Tensor:
        return (self.log_radius.detach().amax(1) - self.log_radius.detach().amin(1)).exp().max()
