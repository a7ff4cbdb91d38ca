"""The product with a packed weight in plain PyTorch: what the kernels must compute, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.packed import unpack_codes, zero_points
from aq_lightning.qtensor import decode


def dequantize(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, columns: int) -> Tensor:
    """Ŵ, float32 (N, K): exact, for scales of 16 bits.

    Args:
        words, scales, zeros: as in :class:`~aq_lightning.kernels.packed.PackedWeight`.
        bits: width of a code.
        columns: K.
    """
    groups, rows = scales.shape
    codes = unpack_codes(words, bits)[:rows, :columns].view(rows, groups, -1)
    points = zero_points(scales, zeros, bits)
    return decode(codes.float(), scales.T[..., None].float(), points.T[..., None].float()).view(rows, columns)


def int4_matmul(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, bias: Tensor | None = None
) -> Tensor:
    """``x Ŵᵀ + b`` accumulated in float32, (…, N) in the dtype of x."""
    weight = dequantize(words, scales, zeros, bits, x.shape[-1])
    y = x.to(torch.float32) @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)
