"""Fake quantization of a scaled weight in plain PyTorch: what the kernel must compute, gradients included."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.qtensor import decode, encode, grid_of
from aq_lightning.scheme import Grid


def fake_quantize(
    value: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    low: Tensor,
    high: Tensor,
    direction: Tensor | None,
    grid: Grid,
    storage: torch.dtype,
    rounding_only: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    r"""Rounds :math:`w = \mathrm{diag}(r)\, v\, \mathrm{diag}(c)` to its grid, :math:`\hat w`.

    Args:
        value: v, (out, in).
        rows, columns: r (out) and c (in); None: ones.
        low, high: fractions of each group's least and greatest weight at which its range ends, (out, groups).
        direction: d, (in); None: zeros.
        grid: bits, group size, symmetry.
        storage: dtype of the scales in the checkpoint.
        rounding_only: whether the second result is that of ``w − ŵ`` or of ``w``.
        dtype: of the first result.

    Returns:
        :math:`\hat w`, (out, in), and :math:`(w - \hat w)\, d` or :math:`w\, d`, (out) in the dtype of ``low``.
    """
    weight = value.to(low.dtype)
    weight = weight if rows is None else weight * rows[:, None]
    weight = weight if columns is None else weight * columns
    groups = weight.unflatten(1, (low.shape[1], -1))  # (out, groups, size)
    ends = groups.amin(-1) * low, groups.amax(-1) * high
    scale, zero = (x[..., None] for x in grid_of(*ends, grid, storage))  # (out, groups, 1)
    rounded = decode(encode(groups, scale, zero, grid), scale, zero).flatten(1)
    if direction is None:
        return rounded.to(dtype), weight.new_zeros(weight.shape[0])
    return rounded.to(dtype), (weight - rounded if rounding_only else weight) @ direction
