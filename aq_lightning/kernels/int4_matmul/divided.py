"""The product for few tokens: warps of a block share its rows and divide the columns.

A product of one token reads each weight once and computes next to nothing, so all that counts is how much is under way
at once. Every warp reads columns of its own into sums of its own, which meet in the block's memory at the end. Blocks
that divide columns leave their sums in the GPU's memory instead, and the last of them waits to read them again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from aq_lightning.kernels.dispatch import Compute, Launch
from aq_lightning.kernels.int4_matmul.config import Config
from aq_lightning.kernels.int4_matmul.overlap import start_early
from aq_lightning.kernels.int4_matmul.tiles import grid_of_rows, store
from aq_lightning.kernels.int4_matmul.unpack import common, operand, plane, start
from aq_lightning.kernels.packed import Operands


@triton.jit(do_not_specialize=["M", "spans"])
def _divided_kernel(
    x, words, scales, bias, y,
    M, N, K, spans,
    BITS: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile [R, T] of Yᵀ: of PARTS tiles of columns in a row, each of PARTS warps takes one. GROUP: chunks that share
    a scale, 0 if a whole row does."""
    SAME: tl.constexpr = common(GROUP, CODES)  # chunks of a tile that share a scale
    TILE: tl.constexpr = PLANES * 64 * CHUNK  # words
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_n, o_m = i_n * R + tl.arange(0, R), i_m * T + tl.arange(0, T)
    o_c, o_p = tl.arange(0, CHUNK), tl.arange(0, PARTS)
    m_n, m_m = o_n < N, o_m < M
    o_tile = tl.minimum(o_n // 64, (N - 1) // 64)  # rows behind the last tile read it again; nothing of theirs is kept
    p_w = words + (o_tile * (spans * TILE) + (o_n % 64) * CHUNK)[None, :, None] + o_c[None, None, :]
    p_w += o_p[:, None, None] * TILE
    p_x = x + o_m[None, None, :].to(tl.int64) * K + o_c[None, :, None] + o_p[:, None, None] * (CODES * CHUNK)
    if OVERLAP:
        start_early(words, 0, spans, spans, N, R, CHUNK, TILE)
    b_row, b_s, b_z = tl.zeros([R], tl.float32), tl.zeros([PARTS, R], tl.float32), tl.zeros([PARTS, R], tl.float32)
    if GROUP == 0:
        b_row, b_zero = grid_of_rows(scales + o_n, m_n)
        b_z = tl.broadcast_to(b_zero[None, :], [PARTS, R])
    b_y = tl.zeros([PARTS, R, T], tl.float32)
    for i_step in tl.range(0, tl.cdiv(spans, PARTS), num_stages=STAGES):
        o_span = i_step * PARTS + o_p
        m_p = o_span < spans
        for begin in tl.static_range(0, CODES, SAME):
            if GROUP != 0:
                o_group = (o_span * CODES + begin) // GROUP
                m_s = m_n[None, :] & (m_p & (o_group * (GROUP * CHUNK) < K))[:, None]
                b_s, b_z = grid_of_rows(scales + o_group[:, None] * N + o_n[None, :], m_s)
            b_sum = b_y if GROUP == 0 else tl.zeros([PARTS, R, T], tl.float32)
            for chunk in tl.static_range(begin, begin + SAME):
                p_plane = p_w + i_step * (PARTS * TILE) + plane(BITS, chunk) * (64 * CHUNK)
                b_w = tl.load(p_plane, mask=m_p[:, None, None], other=0)
                b_next = b_w
                if start(BITS, chunk) + BITS > 16:
                    b_next = tl.load(p_plane + 64 * CHUNK, mask=m_p[:, None, None], other=0)
                m_x = m_p[:, None, None] & m_m[None, None, :]
                if RAGGED:
                    m_x = m_x & ((o_span[:, None] * CODES + chunk) * CHUNK + o_c[None, :] < K)[:, :, None]
                b_x = tl.load(p_x + (i_step * (PARTS * CODES) + chunk) * CHUNK, mask=m_x, other=0.0)
                b_v = operand(b_w, b_next, b_z, b_s, BITS, chunk, DTYPE, False, ASSEMBLY)  # [PARTS, R, CHUNK]
                b_sum = tl.dot(b_v, b_x, b_sum)
            b_y = b_sum if GROUP == 0 else b_y + b_sum * b_s[:, :, None]
    store(tl.sum(b_y, axis=0), b_row, bias, y, o_n, o_m, N, M, GROUP == 0, HAS_BIAS)


def plan(x: Tensor, weight: Operands, bias: Tensor | None, config: Config, constants: dict[str, object]) -> Compute:
    """The product of (x, words, scales, bias) that look like these.

    Args:
        x: float16 or bfloat16 (…, K).
        weight: the packed tensors.
        bias: (N); None: none.
        config: how to cut the work.
        constants: what kernels are compiled for.
    """
    columns, rows = x.shape[-1], weight.scales.shape[1]
    tokens, shape = x.shape[:-1].numel(), (*x.shape[:-1], rows)
    launch = Launch(
        _divided_kernel,
        (triton.cdiv(tokens, config.tokens), triton.cdiv(rows, config.rows)),
        (tokens, rows, columns, weight.words.shape[1]),
        {
            **constants, "HAS_BIAS": bias is not None, "RAGGED": columns % weight.span != 0, "R": config.rows,
            "T": config.tokens, "PARTS": config.warps, "STAGES": config.stages, "OVERLAP": config.overlap,
        },
        **config.options,
    )  # fmt: skip

    def multiplied(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(shape)
        launch(x.contiguous(), words, scales, bias, y)
        return y

    return multiplied
