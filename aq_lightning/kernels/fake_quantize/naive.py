"""Fake quantization of a scaled weight in plain PyTorch: what the kernel must compute, gradients included."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aq_lightning.qtensor import decode, encode, grid_of
from aq_lightning.scheme import Grid


class Request(NamedTuple):
    """A weight :math:`w = \\mathrm{diag}(r)\\, v\\, \\mathrm{diag}(c)` and how to round it."""

    value: Tensor
    """v, (out, in)."""
    rows: Tensor | None
    """r, (out); None: ones."""
    columns: Tensor | None
    """c, (in); None: ones."""
    low: Tensor
    """Fraction of each group's least weight at which its range ends, (out, groups)."""
    high: Tensor
    """The same of the greatest."""
    direction: Tensor | None
    """d, (in); None: zeros."""
    offset: Tensor | None
    """Steps added to each weight before rounding, (out, in); None: none."""
    grid: Grid
    """Bits, group size, symmetry."""
    storage: torch.dtype
    """Of the scales in the checkpoint."""
    rounding_only: bool
    """Whether d meets ``w − ŵ``, or ``w``."""
    dtype: torch.dtype
    """Of the rounded weight."""


def fake_quantize(request: Request) -> tuple[Tensor, Tensor]:
    """Rounds w to its grid.

    Returns:
        ``ŵ``, (out, in) in the dtype asked for, and ``(w − ŵ) d`` or ``w d``, (out) in the dtype of ``low``.
    """
    value, rows, columns, low, high, direction, offset, grid, storage, rounding_only, dtype = request
    weight = value.to(low.dtype)
    weight = weight if rows is None else weight * rows[:, None]
    weight = weight if columns is None else weight * columns
    groups = weight.unflatten(1, (low.shape[1], -1))  # (out, groups, size)
    ends = groups.amin(-1) * low, groups.amax(-1) * high
    scale, zero = (x[..., None] for x in grid_of(*ends, grid, storage))  # (out, groups, 1)
    steps = None if offset is None else offset.view_as(groups).to(low.dtype)
    rounded = decode(encode(groups, scale, zero, grid, steps), scale, zero).flatten(1)
    if direction is None:
        return rounded.to(dtype), weight.new_zeros(weight.shape[0])
    return rounded.to(dtype), (weight - rounded if rounding_only else weight) @ direction
