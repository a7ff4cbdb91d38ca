"""The product of quantized activations with a packed weight in plain PyTorch: what the kernels must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.int4_matmul import naive
from aq_lightning.qtensor import decode, encode, grid_of
from aq_lightning.scheme import Grid


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Signed integers, int8 (…, K) in ``−2^(bits−1) … 2^(bits−1) − 1``, and a scale per token, float32 (…, 1)."""
    grid, wide = Grid(bits, symmetric=True), x.float()
    scale, zero = grid_of(wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True), grid)
    return (encode(wide, scale, zero, grid) - zero).to(torch.int8), scale


def fake_quantize(x: Tensor, bits: int) -> Tensor:
    """What the integers stand for, in the dtype of x."""
    codes, scale = quantize(x, bits)
    return decode(codes.float(), scale, torch.zeros_like(scale)).to(x.dtype)


def int4_int8_matmul(
    x: Tensor, words: Tensor, scales: Tensor, bits: int, activation_bits: int, bias: Tensor | None = None
) -> Tensor:
    """``x̂ Ŵᵀ + b`` accumulated in float32, (…, N) in the dtype of x."""
    codes, scale = quantize(x, activation_bits)
    y = (codes.float() @ naive.dequantize(words, scales, bits, x.shape[-1]).T) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)
