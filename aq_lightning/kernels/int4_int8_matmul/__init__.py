"""Activations quantized per token times packed integer weights, on integer tensor cores: one operator."""

from __future__ import annotations

from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.kernels.dispatch import Compute, operator, planned
from aq_lightning.kernels.int4_int8_matmul import naive
from aq_lightning.kernels.int4_matmul import int4_matmul
from aq_lightning.kernels.int4_matmul.config import Product, choose
from aq_lightning.kernels.packed import Operands, expect

IN_BYTES = (2, 4)
"""Widths of weight codes of which a byte holds several and whose distance from a zero point fits a byte."""


@operator
def int4_int8_matmul(
    x: Tensor, words: Tensor, scales: Tensor, bits: int, activation_bits: int, bias: Tensor | None = None
) -> Tensor:
    """``y = x̂ Ŵᵀ + b`` with Ŵ as a :class:`~aq_lightning.kernels.packed.PackedWeight` holds it, and x̂ the activations
    rounded to one symmetric grid per token.

    On a GPU, weights of 2 and 4 bits meet the activations as integers (a tensor core has no operands below 8 bits since
    Hopper, so 4-bit activations travel as 8); others are multiplied as by :func:`~int4_matmul`. Elsewhere by
    :func:`naive.int4_int8_matmul`. The same numbers at every call. It has no gradient.

    Args:
        x: (…, K), float16 or bfloat16; float32 too on the CPU.
        words, scales: those of the packed weight.
        bits: width of a weight's code, 2 to 8.
        activation_bits: width of an activation's code, 2 to 8.
        bias: (N); None: none.

    Returns:
        (…, N) in the dtype of x.

    Raises:
        RequestError: a shape, dtype, device or width does not fit; the message names the fix.
    """
    return _plan(x, words, scales, bits, bias, activation_bits)(x, words, scales, bias)


@planned
def _plan(x: Tensor, words: Tensor, scales: Tensor, bits: int, bias: Tensor | None, activation_bits: int) -> Compute:
    expect(x, words, scales, bits, bias)
    if not 2 <= activation_bits <= 8:
        raise RequestError(f"Activations have 2 to 8 bits here, got {activation_bits}: use int4_matmul for 16.")
    if x.device.type != "cuda":
        return lambda x, words, scales, bias: naive.int4_int8_matmul(x, words, scales, bits, activation_bits, bias)
    if bits not in IN_BYTES:
        return lambda x, words, scales, bias: int4_matmul(
            naive.fake_quantize(x, activation_bits), words, scales, bits, bias
        )
    from aq_lightning.kernels.int4_int8_matmul import triton

    config = choose(Product(x.shape[:-1].numel(), scales.shape[1], x.shape[-1], bits, 8), x.device)
    return triton.plan(x, Operands(words, scales, bits), activation_bits, bias, config)
