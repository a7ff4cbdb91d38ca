r"""The one definition of the integer grid: training, merging, packing and export read these lines.

With codes :math:`u \in \{0, …, 2^b - 1\}`, scale :math:`s > 0` and integer zero point :math:`z` in the same range,

.. math:: \hat w = (u - z)\, s, \qquad u = \mathrm{clamp}(\mathrm{round}(w / s) + z,\; 0,\; 2^b - 1).

The range [lo, hi] of a group always contains 0, so :math:`z` is in range and 0 is represented exactly:
asymmetric :math:`s = (hi - lo) / (2^b - 1)`, :math:`z = \mathrm{round}(-lo / s)`; symmetric
:math:`s = \max(|lo|, |hi|) / \tfrac{2^b - 1}{2}`, :math:`z = 2^{b-1}`: the rule of compressed-tensors to the last bit
(a token's largest element lies on a rounding tie), so that the activation grid of a checkpoint is the one trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aq_lightning.scheme import Grid


def round_through(x: Tensor) -> Tensor:
    """Rounds half to even; the gradient passes unchanged (straight-through estimator)."""
    return x + (x.round() - x).detach()


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of each row, (…, channels) → (…, 1) each; the gradient goes to one that is, the first.

    That of ``amin`` goes to all that are equal to the least. Compiled code may compute x again for the backward pass
    without the rounding to bfloat16 that was in between: then none is, and the gradient is 0 / 0.
    """
    if not x.requires_grad:
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    channel = torch.arange(x.shape[-1], device=x.device)
    at = (channel == place for place in (x.detach().argmin(-1, keepdim=True), x.detach().argmax(-1, keepdim=True)))
    low, high = (torch.where(each, x, 0).sum(-1, keepdim=True) for each in at)
    return low, high


def grid_of(low: Tensor, high: Tensor, grid: Grid, storage: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range ``[low, high]``; differentiable in both ends.

    Args:
        low, high: ends of each group's range, any equal shapes.
        grid: bits and symmetry.
        storage: dtype in which the checkpoint keeps the scale; the scale is rounded to it here, so that training
            sees the stored number. None: no rounding (activation scales are never stored).

    Returns:
        ``(scale, zero)`` of the shape of ``low``; ``zero`` holds integers.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        scale = _divided(torch.maximum(-low, high), (grid.levels - 1) / 2)
    else:
        scale = _divided(high - low, grid.levels - 1)
    if storage is not None:
        scale = scale + (scale.to(storage).to(scale.dtype) - scale).detach()
    # A group of zeros has no range: the smallest normal step keeps every division finite and its codes at zero.
    scale = torch.where(scale > 0, scale, torch.finfo(storage or scale.dtype).smallest_normal)
    if grid.symmetric:
        return scale, torch.full_like(scale, grid.levels // 2)
    return scale, round_through(-low / scale).clamp(0, grid.levels - 1)


def _divided(x: Tensor, by: float) -> Tensor:
    """``x / by``, rounded once on every device: by a number, not a tensor, a GPU multiplies with its rounded inverse.

    A token's largest element lies on a rounding tie, so that the last bit of a scale decides its code.
    """
    return x / torch.full_like(x, by)


def encode(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, offset: Tensor | None = None) -> Tensor:
    """Codes of ``x`` as floating-point integers; the gradient passes the rounding and stops at the clamp.

    Args:
        x: what to round.
        scale, zero: of its groups, as :func:`grid_of` gives them.
        grid: bits.
        offset: steps added before rounding, of the shape of ``x``: within ±½ it chooses a neighbour; None: none.
    """
    steps = x / scale if offset is None else x / scale + offset
    return (round_through(steps) + zero).clamp(0, grid.levels - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values of the codes."""
    return (codes - zero) * scale


@dataclass(frozen=True)
class QTensor:
    """A quantized weight."""

    codes: Tensor
    """uint8 (out, in): ``0 … 2^bits − 1``."""
    scale: Tensor
    """Storage dtype (out, groups)."""
    zero: Tensor
    """uint8 (out, groups): ``0 … 2^bits − 1``."""
    grid: Grid
    """Bits, group size and symmetry."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The represented weight, (out, in) in ``dtype``; exact in float32 for scales of 16 bits."""
        codes = self.codes.unflatten(1, (self.scale.shape[1], -1)).to(dtype)  # (out, groups, size)
        values = decode(codes, self.scale.to(dtype)[..., None], self.zero.to(dtype)[..., None])
        return values.flatten(1)  # (out, in)

    def split(self, count: int) -> list[QTensor]:
        """The weight as ``count`` weights of equally many rows; the inverse of :meth:`joined`."""
        parts = zip(self.codes.chunk(count), self.scale.chunk(count), self.zero.chunk(count), strict=True)
        return [QTensor(codes, scale, zero, self.grid) for codes, scale, zero in parts]

    @staticmethod
    def joined(parts: Sequence[QTensor]) -> QTensor:
        """One weight with the rows of all, which have one grid."""
        codes, scale, zero = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero"))
        return QTensor(codes, scale, zero, parts[0].grid)

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales and (asymmetric) zero points."""
        per_group = torch.finfo(self.scale.dtype).bits + (0 if self.grid.symmetric else self.grid.bits)
        return self.codes.numel() * self.grid.bits + self.scale.numel() * per_group
