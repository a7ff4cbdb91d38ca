"""A Kronecker product, rounding per token and the product with a packed weight behind them: one operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.kernels.dispatch import Compute, operator, planned
from aq_lightning.kernels.int4_int8_matmul import IN_BYTES, int4_int8_matmul
from aq_lightning.kernels.int4_matmul.config import Product, choose
from aq_lightning.kernels.kronecker_matmul import naive
from aq_lightning.kernels.kronecker_matmul.naive import Kronecker as Kronecker
from aq_lightning.kernels.packed import Operands, expect

LARGEST = 16384
"""Numbers of a token that a program holds, both sizes padded to powers of two."""


def kronecker_matmul(
    x: Tensor, by: Kronecker, weight: Operands, activation_bits: int, bias: Tensor | None = None
) -> Tensor:
    """``y = Q(x (A₁ ⊗ A₂)) Ŵᵀ + b``, Q cutting and rounding each token as in :mod:`naive`.

    On a GPU two kernels run: one reads each token once, multiplies it by both matrices on tensor cores, and leaves
    nothing but integers and a scale, in the order in which the other, that of :func:`int4_int8_matmul`, reads them.
    Widths of weights that it does not multiply as integers, and maps too large for a program, take the plain way to the
    same numbers; so does everything elsewhere. The same numbers at every call. It has no gradient.

    Args:
        x: (…, K), float16 or bfloat16; float32 too on the CPU.
        by: the map, in the dtype of x; ``n₁ n₂ = K``.
        weight: the packed tensors.
        activation_bits: width of an activation's code, 2 to 8.
        bias: (N); None: none.

    Returns:
        (…, N) in the dtype of x.

    Raises:
        RequestError: a shape, dtype, device or width does not fit; the message names the fix.
    """
    return _kronecker_matmul(x, *weight, bias, *by, activation_bits)


@operator
def _kronecker_matmul(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bits: int,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor | None,
    activation_bits: int,
) -> Tensor:
    plan = _plan(x, words, scales, bits, bias, left, right, clip, activation_bits)
    return plan(x, words, scales, bias, Kronecker(left, right, clip))


@planned
def _plan(x: Tensor, words: Tensor, scales: Tensor, bits: int, bias: Tensor | None, *more: Any) -> Compute:
    expect(x, words, scales, bits, bias)
    *matrices, activation_bits = more
    by, weight = Kronecker(*matrices), Operands(words, scales, bits)
    _expect(x, by)
    if x.device.type != "cuda" or bits not in IN_BYTES or size(by) > LARGEST or not 2 <= activation_bits <= 8:
        return lambda x, words, scales, bias, by: int4_int8_matmul(
            naive.transformed(x, by), words, scales, bits, activation_bits, bias
        )
    from aq_lightning.kernels.int4_int8_matmul import triton as product
    from aq_lightning.kernels.kronecker_matmul import triton

    config = choose(Product(x.shape[:-1].numel(), scales.shape[1], x.shape[-1], bits, 8), x.device)
    width = product.width_of(x.shape[-1], weight, config)
    quantize = triton.quantizer(x, by, activation_bits, weight, width, config.overlap)
    multiply = product.multiplier(x, weight, bias, config)
    return lambda x, words, scales, bias, by: multiply(*quantize(x, by), words, scales, bias)


def size(by: Kronecker) -> int:
    """Numbers that a program holds of a token."""
    return padded(by.left.shape[0]) * padded(by.right.shape[0])


def padded(side: int) -> int:
    """The side of a matrix on tensor cores: a power of two."""
    return max(16, 1 << (side - 1).bit_length())


def _expect(x: Tensor, by: Kronecker) -> None:
    """Refuses matrices that do not fit the activations."""
    sides = by.left.shape[0], by.right.shape[0]
    if by.left.shape != (sides[0],) * 2 or by.right.shape != (sides[1],) * 2 or sides[0] * sides[1] != x.shape[-1]:
        raise RequestError(
            f"A Kronecker product has matrices (n₁, n₁) and (n₂, n₂) with n₁ n₂ = {x.shape[-1]} channels, got "
            f"{tuple(by.left.shape)} and {tuple(by.right.shape)}: give those of the weight's input."
        )
    for name, tensor in by._asdict().items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise RequestError(
                f"{name} has the dtype and device of the activations, {x.dtype} on {x.device}, got {tensor.dtype} on "
                f"{tensor.device}: convert it with .to(…)."
            )
