"""The product for few tokens: warps of a block share its rows and divide the columns.

A product of one token reads each weight once and computes next to nothing, so all that counts is how much is under way
at once. Every warp reads columns of its own into sums of its own, which meet in the block's memory at the end. Blocks
that divide columns leave their sums in the GPU's memory instead, and the last of them waits to read them again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aq_lightning.kernels.int4_int8_matmul.tiles import operands, store
from aq_lightning.kernels.int4_matmul.overlap import start_early
from aq_lightning.kernels.int4_matmul.tiles import grid_of_rows
from aq_lightning.kernels.int4_matmul.unpack import common


@triton.jit(do_not_specialize=["M", "spans"])
def divided_kernel(
    x, scale, words, scales, bias, y,
    M, N, K, WIDTH, spans,
    BITS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """A tile [R, T] of Yᵀ: of PARTS tiles of columns in a row, each of PARTS warps takes one. GROUP: chunks that share
    a scale, 0 if a whole row does."""
    BYTES: tl.constexpr = 2 * CHUNK
    PER: tl.constexpr = 8 // BITS
    CODES: tl.constexpr = 2 * PER
    SAME: tl.constexpr = common(GROUP, CODES)  # codes of a string that share a scale
    COUNT: tl.constexpr = PER if SAME == CODES else SAME  # of them in a byte
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_n, o_m = i_n * R + tl.arange(0, R), i_m * T + tl.arange(0, T)
    o_e, o_p = tl.arange(0, BYTES), tl.arange(0, PARTS)
    o_tile = tl.minimum(o_n // 64, (N - 1) // 64)
    p_w = words + (o_tile * (spans * 64 * BYTES) + (o_n % 64) * BYTES)[None, :, None] + o_e[None, None, :]
    p_w += o_p[:, None, None] * (64 * BYTES)
    p_x = x + o_m[None, None, :].to(tl.int64) * WIDTH + o_e[None, :, None] + o_p[:, None, None] * (PER * BYTES)
    if OVERLAP:
        start_early(words, 0, spans, spans, N, R, CHUNK, 64 * CHUNK, 2)
    b_row, b_s, b_z = tl.zeros([R], tl.float32), tl.zeros([PARTS, R], tl.float32), tl.zeros([PARTS, R], tl.float32)
    if GROUP == 0:
        b_row, b_zero = grid_of_rows(scales + o_n, o_n < N)
        b_z = tl.broadcast_to(b_zero[None, :], [PARTS, R])
    b_y = tl.zeros([PARTS, R, T], tl.int32 if GROUP == 0 else tl.float32)
    for i_step in tl.range(0, tl.cdiv(spans, PARTS), num_stages=STAGES):
        o_span = i_step * PARTS + o_p
        m_p = o_span < spans
        m_x = m_p[:, None, None] & (o_m < M)[None, None, :]
        for begin in tl.static_range(0, CODES, SAME):
            if GROUP != 0:
                o_group = (o_span * CODES + begin) // GROUP
                m_s = (o_n < N)[None, :] & (m_p & (o_group * (GROUP * CHUNK) < K))[:, None]
                b_s, b_z = grid_of_rows(scales + o_group[:, None] * N + o_n[None, :], m_s)
            b_sum = b_y if GROUP == 0 else tl.zeros([PARTS, R, T], tl.int32)
            for code in tl.static_range(begin % PER, begin % PER + COUNT):
                b_bytes = tl.load(p_w + i_step * (PARTS * 64 * BYTES), mask=m_p[:, None, None], other=0)
                b_x = tl.load(p_x + (i_step * (PARTS * PER) + code) * BYTES, mask=m_x, other=0)
                b_w = operands(b_bytes, b_z, BITS, code, 1, -1 if SAME == CODES else begin // PER, ASSEMBLY)
                b_sum = tl.dot(b_w, b_x, b_sum, out_dtype=tl.int32)
            b_y = b_sum if GROUP == 0 else b_y + b_sum.to(tl.float32) * b_s[:, :, None]
    store(tl.sum(b_y, axis=0).to(tl.float32), b_row, scale, bias, y, o_n, o_m, N, M, GROUP == 0, HAS_BIAS)
