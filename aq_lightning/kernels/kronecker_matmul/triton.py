"""Tokens through a Kronecker product to integers in one pass over memory: programs keep both matrices and walk tokens.

A token is a matrix X of n₁ rows, ``leftᵀ X right`` two products on tensor cores with sizes padded to powers of two.
What comes between the products, and the result, are rounded to the dtype of x as the plain path rounds them; they stay
on the chip. Its integers leave in the order of the weight's bytes (:mod:`int4_int8_matmul.rounding`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aq_lightning.kernels.dispatch import Launch
from aq_lightning.kernels.fake_quantize.parts import round_even
from aq_lightning.kernels.int4_int8_matmul.rounding import Quantize, greatest, integers, larger, place, step_of
from aq_lightning.kernels.kronecker_matmul import padded
from aq_lightning.kernels.kronecker_matmul.naive import Kronecker
from aq_lightning.kernels.packed import Operands

_PROGRAMS = 528  # of a launch: four for each processor of an H100; each walks over its share of the tokens


@triton.jit
def _matrix(p, o_i, o_j, N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """(n₁, n₂) at p, padded with zeros to [R, C]."""
    p_a = p + o_i[:, None] * N2 + o_j[None, :]
    if R == N1 and C == N2:
        return tl.load(p_a)
    else:
        return tl.load(p_a, mask=(o_i < N1)[:, None] & (o_j < N2)[None, :], other=0.0)


@triton.jit
def _greatest(b_y):
    """Of a token [R, C], as :func:`greatest`."""
    return greatest(tl.max(b_y.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True))


@triton.jit
def _ends(b_y, clip, DTYPE: tl.constexpr):
    """The least and the greatest number of a token [R, C] once it is cut to fractions of its own, float32; one is NaN
    if any number is."""
    b_low = tl.max(tl.max(b_y.to(tl.uint32, bitcast=True), axis=1), axis=0)  # the sign comes first, then the size
    b_low = -larger(-b_low.to(tl.float32, bitcast=True), 0.0)
    b_high = _greatest(b_y)
    b_from = (b_low * tl.load(clip).to(tl.float32)).to(DTYPE).to(tl.float32)
    b_to = (b_high * tl.load(clip + 1).to(tl.float32)).to(DTYPE).to(tl.float32)
    return larger(b_low, b_from), -larger(-b_high, -b_to)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _kronecker_quantize_kernel(
    x, left, right, clip, codes, scale, tokens, steps, WIDTH,
    N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr, PER: tl.constexpr, HAS_CLIP: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """``steps`` tokens: of each its scale, and its integers from ``−HALF`` to ``HALF − 1``."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    o_i, o_j = tl.arange(0, R), tl.arange(0, C)
    b_left = tl.trans(_matrix(left, o_i, tl.arange(0, R), N1, N1, R, R))  # nothing writes these: no need to wait
    b_right = _matrix(right, o_j, tl.arange(0, C), N2, N2, C, C)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    first = tl.program_id(0).to(tl.int64) * steps
    for step in tl.range(0, tl.minimum(steps, tokens - first), num_stages=STAGES):
        i_m = first + step
        b_x = _matrix(x + i_m * (N1 * N2), o_i, o_j, N1, N2, R, C)
        b_y = tl.dot(b_left, tl.dot(b_x, b_right).to(DTYPE)).to(DTYPE).to(tl.float32)  # [R, C]
        b_least, b_most = -HALF, HALF - 1.0
        if HAS_CLIP:  # rounding keeps order: cutting numbers cuts their codes
            b_low, b_high = _ends(b_y, clip, DTYPE)
            b_s = step_of(larger(-b_low, b_high), HALF)
            b_least = tl.maximum(round_even(tl.div_rn(b_low, b_s)), -HALF)
            b_most = tl.minimum(round_even(tl.div_rn(b_high, b_s)), HALF - 1.0)
        else:
            b_s = step_of(_greatest(tl.abs(b_y)), HALF)
        tl.store(scale + i_m, b_s)
        b_u = integers(b_y, b_s, b_least, b_most, FUSED)
        p_u = codes + i_m * WIDTH
        if C == N2 and R * C % (2 * PER * CHUNK) == 0:  # the order of the bytes is that of the tile's dimensions
            b_u = tl.reshape(b_u, (R * C // (2 * PER * CHUNK), 2, PER, CHUNK))
            b_u = tl.reshape(tl.permute(b_u, (0, 2, 3, 1)), (R * C,))
            o_p = tl.arange(0, R * C)
            tl.store(p_u + o_p, b_u, mask=o_p < WIDTH)
        else:
            o_p = place(o_i[:, None] * N2 + o_j[None, :], CHUNK, PER)
            tl.store(p_u + o_p, b_u, mask=(o_i < N1)[:, None] & (o_j < N2)[None, :])


def quantize(
    x: Tensor, by: Kronecker, bits: int, weight: Operands, width: int, overlap: bool = False
) -> tuple[Tensor, Tensor]:
    """The integers of the transformed tokens, int8 (M, width), in the order of the weight's bytes, and scales (M).

    Args:
        x: float16 or bfloat16 (…, n₁ n₂), of M tokens.
        by: the map, in the dtype of x.
        bits: of an integer.
        weight: in whose order.
        width: bytes of a token, zeros behind the last channel.
        overlap: whether it starts before the kernel ahead has ended; Hopper.
    """
    return quantizer(x, by, bits, weight, width, overlap)(x, by)


def quantizer(x: Tensor, by: Kronecker, bits: int, weight: Operands, width: int, overlap: bool = False) -> Quantize:
    """:func:`quantize` of (x, by) that look like these."""
    tokens, sides = x.shape[:-1].numel(), (by.left.shape[0], by.right.shape[0])
    rows, columns = padded(sides[0]), padded(sides[1])
    covered = columns == sides[1] and rows * columns >= width
    steps, warps = max(1, triton.cdiv(tokens, _PROGRAMS)), 4 if rows * columns <= 4096 else 8
    # Stages and registers are such that two programs fit a processor.
    launch = Launch(
        _kronecker_quantize_kernel, (triton.cdiv(tokens, steps),), (tokens, steps, width),
        {
            "N1": sides[0], "N2": sides[1], "R": rows, "C": columns, "HALF": 2 ** (bits - 1),
            "CHUNK": weight.words.shape[4], "PER": 8 // weight.bits, "HAS_CLIP": by.clip is not None,
            "OVERLAP": overlap, "FUSED": x.is_cuda, "STAGES": 2 if rows * columns <= 8192 else 1,
        },
        num_warps=warps, maxnreg=128 if warps == 8 else None, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip

    def quantized(x: Tensor, by: Kronecker) -> tuple[Tensor, Tensor]:
        codes = (x.new_empty if covered else x.new_zeros)((tokens, width), dtype=torch.int8)
        scale = x.new_empty(tokens, dtype=torch.float32)
        launch(x.contiguous(), by.left.contiguous(), by.right.contiguous(), by.clip, codes, scale)
        return codes, scale

    return quantized
