"""Half-precision activations times packed integer weights: one operator, which torch.compile and CUDA graphs keep."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.int4_matmul import naive
from aq_lightning.kernels.int4_matmul.config import Product, choose
from aq_lightning.kernels.packed import Operands, expect


@torch.library.custom_op("aq_lightning::int4_matmul", mutates_args=())
def int4_matmul(x: Tensor, words: Tensor, scales: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``y = x Ŵᵀ + b`` with Ŵ as a :class:`~aq_lightning.kernels.packed.PackedWeight` holds it.

    On a GPU by a kernel, elsewhere by :func:`naive.int4_matmul`; the same numbers at every call. It has no gradient.

    Args:
        x: (…, K), float16 or bfloat16; float32 too on the CPU.
        words, scales: those of the packed weight.
        bits: width of a code, 2 to 8.
        bias: (N); None: none.

    Returns:
        (…, N) in the dtype of x.

    Raises:
        RequestError: a shape, dtype or device does not fit; the message names the fix.
    """
    expect(x, words, scales, bits, bias)
    if x.device.type != "cuda":
        return naive.int4_matmul(x, words, scales, bits, bias)
    from aq_lightning.kernels.int4_matmul import triton

    rows, columns = scales.shape[1], x.shape[-1]
    tokens = x.reshape(-1, columns).contiguous()
    with torch.cuda.device(x.device):
        config = choose(Product(tokens.shape[0], rows, columns, bits), x.device)
        return triton.int4_matmul(tokens, Operands(words, scales, bits), bias, config).view(*x.shape[:-1], rows)


@int4_matmul.register_fake
def _(x, words, scales, bits, bias=None):
    return x.new_empty(*x.shape[:-1], scales.shape[1])
