"""A tile of packed weights, unpacked in registers, with the grids of its rows; and how one of the answer is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from aq_lightning.kernels.int4_matmul.unpack import beside, operand, plane, start


@triton.jit
def grid_of_rows(p_scales, m):
    """Scales and zero points of rows, float32 [R]; 0 where masked."""
    b_word = tl.load(p_scales, mask=m, other=0)
    return (b_word & -256).to(tl.float32, bitcast=True), (b_word & 255).to(tl.float32)


@triton.jit
def store(b_y, b_s, bias, y, o_n, o_m, N, M, ROW_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Stores a tile of Yᵀ, [R, T], as Y."""
    if ROW_SCALE:
        b_y = b_y * b_s[:, None]
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    p_y = y + o_m[None, :].to(tl.int64) * N + o_n[:, None]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(o_m < M)[None, :] & (o_n < N)[:, None])


@triton.jit
def weight_of(
    p_tile, b_z, b_s,
    BITS: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr,
    DTYPE: tl.constexpr, SCALED: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One chunk of columns of a tile, [R, CHUNK]."""
    b_w = tl.load(p_tile + plane(BITS, CODE) * (64 * CHUNK))
    b_next = b_w
    if start(BITS, CODE) + BITS > 16:
        b_next = tl.load(p_tile + (plane(BITS, CODE) + 1) * (64 * CHUNK))
    return operand(b_w, b_next, b_z, b_s, BITS, CODE, DTYPE, SCALED, ASSEMBLY)


@triton.jit
def weights_of(
    p_w, i_first, chunk, spans, b_z, b_s,
    BITS: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr, SCALED: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """WIDE chunks of columns side by side, [R, WIDE · CHUNK]; ``chunk`` is the first, counted from tile ``i_first``."""
    if WIDE == 1:
        p_tile = p_w + tl.minimum(i_first + chunk // CODES, spans - 1) * (PLANES * 64 * CHUNK)
        return weight_of(p_tile, b_z, b_s, BITS, chunk % CODES, CHUNK, DTYPE, SCALED, ASSEMBLY)
    else:
        HALF: tl.constexpr = WIDE // 2
        b_left = weights_of(
            p_w, i_first, chunk, spans, b_z, b_s, BITS, PLANES, CODES, CHUNK, HALF, DTYPE, SCALED, ASSEMBLY
        )
        b_right = weights_of(
            p_w, i_first, chunk + HALF, spans, b_z, b_s, BITS, PLANES, CODES, CHUNK, HALF, DTYPE, SCALED, ASSEMBLY
        )
        return beside(b_left, b_right)
