"""A Kronecker product, rounding per token and the product with a packed weight behind them: one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
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
    return _operator(x, *by, *weight, activation_bits, bias)


@torch.library.custom_op("aq_lightning::kronecker_matmul", mutates_args=())
def _operator(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    clip: Tensor | None,
    words: Tensor,
    scales: Tensor,
    bits: int,
    activation_bits: int,
    bias: Tensor | None,
) -> Tensor:
    expect(x, words, scales, bits, bias)
    by = Kronecker(left, right, clip)
    _expect(x, by)
    if x.device.type != "cuda" or bits not in IN_BYTES or size(by) > LARGEST or not 2 <= activation_bits <= 8:
        return int4_int8_matmul(naive.transformed(x, by), words, scales, bits, activation_bits, bias)
    from aq_lightning.kernels.int4_int8_matmul import triton as product
    from aq_lightning.kernels.kronecker_matmul import triton

    weight, rows, columns = Operands(words, scales, bits), scales.shape[1], x.shape[-1]
    tokens = x.reshape(-1, columns).contiguous()
    with torch.cuda.device(x.device):
        config = choose(Product(tokens.shape[0], rows, columns, bits, 8), x.device)
        width = product.width_of(columns, weight, config)
        codes, scale = triton.quantize(tokens, by, activation_bits, weight, width, config.overlap)
        y = product.multiply(codes, scale, weight, bias, config, tokens)
    return y.view(*x.shape[:-1], rows)


@_operator.register_fake
def _(x, left, right, clip, words, scales, bits, activation_bits, bias):
    return x.new_empty(*x.shape[:-1], scales.shape[1])


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
