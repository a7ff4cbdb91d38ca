"""Half-precision activations times packed integer weights: one operator, which torch.compile and CUDA graphs keep."""

from __future__ import annotations

from torch import Tensor

from aq_lightning.kernels.dispatch import Compute, operator, planned
from aq_lightning.kernels.int4_matmul import naive
from aq_lightning.kernels.int4_matmul.config import Product, choose
from aq_lightning.kernels.packed import Operands, expect


@operator
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
    return _plan(x, words, scales, bits, bias)(x, words, scales, bias)


@planned
def _plan(x: Tensor, words: Tensor, scales: Tensor, bits: int, bias: Tensor | None) -> Compute:
    expect(x, words, scales, bits, bias)
    if x.device.type != "cuda":
        return lambda x, words, scales, bias: naive.int4_matmul(x, words, scales, bits, bias)
    from aq_lightning.kernels.int4_matmul import triton

    config = choose(Product(x.shape[:-1].numel(), scales.shape[1], x.shape[-1], bits), x.device)
    return triton.plan(x, Operands(words, scales, bits), bias, config)
