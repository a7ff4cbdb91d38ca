"""The product with a packed weight in plain PyTorch: what the kernels must compute, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.packed import grids, unpack_codes
from aq_lightning.qtensor import decode


def dequantize(words: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """Ŵ, float32 (N, K): exact, for scales of 16 bits.

    Args:
        words, scales: as in :class:`~aq_lightning.kernels.packed.PackedWeight`.
        bits: width of a code.
        columns: K.
    """
    groups, rows = scales.shape
    codes = unpack_codes(words, bits)[:rows, :columns].view(rows, groups, -1)
    scale, zero = (tensor.T[..., None].float() for tensor in grids(scales))  # (rows, groups, 1)
    return decode(codes.float(), scale, zero).view(rows, columns)


def int4_matmul(x: Tensor, words: Tensor, scales: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x Ŵᵀ + b`` accumulated in float32, (…, N) in the dtype of x."""
    weight = dequantize(words, scales, bits, x.shape[-1])
    y = x.to(torch.float32) @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)
