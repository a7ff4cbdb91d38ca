"""One pass over the weight: nothing but the results is written to memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aq_lightning.kernels.fake_quantize.naive import Request
from aq_lightning.kernels.fake_quantize.parts import codes, constants, load, load_weight, reciprocal, round_even

_STORAGE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_TILE = 2048  # elements of a weight that a program holds at once, if a group is no larger
_CHUNK = 64  # rows that a program visits, of a weight with groups


@triton.jit
def _grid(
    b_min, b_max, b_a, b_b, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, STORAGE: tl.constexpr, TINY: tl.constexpr
):
    """Scale, zero before its clamp, and whether the range is more than a point, of groups, float32 [R]."""
    b_lo, b_hi = tl.minimum(b_min * b_a, 0.0), tl.maximum(b_max * b_b, 0.0)
    if SYMMETRIC:
        b_s = tl.div_rn(tl.maximum(-b_lo, b_hi), (LEVELS - 1) / 2)
    else:
        b_s = tl.div_rn(b_hi - b_lo, LEVELS - 1.0)
    b_s = b_s.to(STORAGE).to(tl.float32)
    b_ok = b_s > 0
    b_s = tl.where(b_ok, b_s, TINY)
    if SYMMETRIC:
        b_zr = tl.full(b_s.shape, LEVELS // 2, tl.float32)
    else:
        b_zr = round_even(tl.div_rn(-b_lo, b_s))
    return b_s, b_zr, b_ok


@triton.jit
def _fake_quantize_fwd_kernel(
    value, rows, columns, low, high, direction, offset, rounded, gain, found,
    height, width, size, groups, chunk,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, STORAGE: tl.constexpr, TINY: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DIRECTION: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUNDING_ONLY: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    i_chunk, i_group = tl.program_id(0), tl.program_id(1)
    o_in = tl.arange(0, G)
    o_col = i_group * size + o_in
    b_c = load(columns, o_col, o_in < size, HAS_COLUMNS, 1.0)
    b_d = load(direction, o_col, o_in < size, HAS_DIRECTION, 0.0)
    for i in range(0, chunk, R):
        o_row = i_chunk * chunk + i + tl.arange(0, R)
        m_row = o_row < height
        m = m_row[:, None] if EVEN else m_row[:, None] & (o_in < size)[None, :]
        o_w = o_row[:, None].to(tl.int64) * width + o_col[None, :]
        b_v, b_w = load_weight(value, load(rows, o_row, m_row, HAS_ROWS, 1.0), b_c, o_w, m)
        b_min = tl.min(b_w if EVEN else tl.where(m, b_w, float("inf")), axis=1)
        b_max = tl.max(b_w if EVEN else tl.where(m, b_w, float("-inf")), axis=1)
        o_range = o_row * groups + i_group
        b_a = tl.load(low + o_range, mask=m_row, other=1.0)
        b_b = tl.load(high + o_range, mask=m_row, other=1.0)
        b_s, b_zr, b_ok = _grid(b_min, b_max, b_a, b_b, LEVELS, SYMMETRIC, STORAGE, TINY)
        p_found = found + o_range * 4
        tl.store(p_found, b_min, mask=m_row)
        tl.store(p_found + 1, b_max, mask=m_row)
        tl.store(p_found + 2, tl.where(b_ok, b_s, -b_s), mask=m_row)
        tl.store(p_found + 3, b_zr, mask=m_row)
        b_z = tl.minimum(tl.maximum(b_zr, 0.0), LEVELS - 1.0)
        p_offset = offset + o_w if HAS_OFFSET else offset
        b_x, b_ur, b_u = codes(b_w, b_s, reciprocal(b_s), b_z, p_offset, m, LEVELS, HAS_OFFSET)
        b_q = (b_u - b_z[:, None]) * b_s[:, None]
        tl.store(rounded + o_w, b_q.to(rounded.dtype.element_ty), mask=m)
        if HAS_DIRECTION:
            b_acting = b_w - b_q if ROUNDING_ONLY else b_w
            tl.store(gain + o_range, tl.sum(b_acting * b_d[None, :], axis=1), mask=m_row)


def forward(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`naive.fake_quantize`, and what :func:`backward` needs of the groups; ``low`` is float32."""
    value, low = request.value, request.low
    rounded = torch.empty(value.shape, dtype=request.dtype, device=value.device)
    gain = torch.zeros_like(low)  # (out, groups)
    found = low.new_empty((*low.shape, 4))  # least and greatest weight, scale (negative: of no range), zero
    size = value.shape[1] // low.shape[1]
    columns = triton.next_power_of_2(size)
    rows = max(1, _TILE // columns)
    chunk = max(rows, 16 if low.shape[1] == 1 else _CHUNK)
    grid = (triton.cdiv(value.shape[0], chunk), low.shape[1])
    _fake_quantize_fwd_kernel[grid](
        value, request.rows, request.columns, low, request.high, request.direction, request.offset, rounded, gain,
        found, *value.shape, size, low.shape[1], chunk, EVEN=size == columns, R=rows, G=columns,
        STORAGE=_STORAGE[request.storage], TINY=torch.finfo(request.storage).smallest_normal,
        num_warps=8 if columns <= 4096 else 16, **constants(request),
    )  # fmt: skip
    return rounded, gain.sum(1), found
