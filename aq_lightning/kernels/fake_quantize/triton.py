"""One pass over the weight forward and one backward: nothing but the results is written to memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aq_lightning.kernels.fake_quantize.naive import Request

_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds half to even, below 2^22
_STORAGE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_TILE = 4096  # elements of a weight that a program holds at once, if a group is no larger
_CHUNK = 16  # rows that a program visits at least, so that its partial sums over rows stay small
_SPAN = 128  # columns that a program of the backward pass holds at once
_ROWS = 16  # rows of a program of the backward pass, which leaves partial sums over rows of its own
_WARPS = 8  # of a program of the backward pass


@triton.jit
def _round(x):
    """Half to even; beyond 2^22 the result is clamped anyway."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def _load_weight(
    value, rows, columns, o_row, o_col, m_row, m, width, HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr
):
    """b_v (value), b_r, b_c and b_w = r v c, float32 [R, G]; r [R, 1], c [1, G]."""
    b_v = tl.load(value + o_row[:, None].to(tl.int64) * width + o_col[None, :], mask=m, other=0.0).to(tl.float32)
    b_r = tl.load(rows + o_row, mask=m_row, other=0.0)[:, None] if HAS_ROWS else 1.0
    b_c = tl.load(columns + o_col, mask=o_col < width, other=0.0)[None, :] if HAS_COLUMNS else 1.0
    return b_v, b_r, b_c, b_v * b_r * b_c


@triton.jit
def _grid(
    b_min, b_max, m_row, p_low, p_high,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, STORAGE: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """Fractions, ends of the range, scale and zero of groups from their least and greatest weights, float32 [R]."""
    b_a = tl.load(p_low, mask=m_row, other=1.0)
    b_b = tl.load(p_high, mask=m_row, other=1.0)
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
        b_zr = _round(tl.div_rn(-b_lo, b_s))
    b_z = tl.minimum(tl.maximum(b_zr, 0.0), LEVELS - 1.0)
    return b_a, b_b, b_lo, b_hi, b_s, b_ok, b_zr, b_z


@triton.jit
def _codes(b_w, b_s, b_z, p_offset, m, LEVELS: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """Weights in steps, and their codes before and after the clamp, float32 [R, G]."""
    b_x = tl.div_rn(b_w, b_s[:, None])
    b_o = tl.load(p_offset, mask=m, other=0.0).to(tl.float32) if HAS_OFFSET else 0.0
    b_ur = _round(b_x + b_o) + b_z[:, None]
    return b_x, b_ur, tl.minimum(tl.maximum(b_ur, 0.0), LEVELS - 1.0)


@triton.jit
def _ends_gradient(
    b_ds, b_dz, b_low, b_high, b_lo, b_hi, b_s, b_ok, b_zr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr
):  # fmt: skip
    """Gradients of the range's ends before they were made to contain 0, from those of scale and zero, all [R]."""
    if SYMMETRIC:
        b_ds = tl.where(b_ok, b_ds, 0.0) / ((LEVELS - 1) / 2)
        b_dhi = tl.where(b_hi > -b_lo, b_ds, tl.where(b_hi == -b_lo, b_ds * 0.5, 0.0))
        b_dlo = b_dhi - b_ds
    else:
        b_dz = tl.where((b_zr >= 0.0) & (b_zr <= LEVELS - 1.0), b_dz, 0.0)
        b_ds += b_dz * tl.div_rn(tl.div_rn(b_lo, b_s), b_s)
        b_dhi = tl.where(b_ok, b_ds, 0.0) / (LEVELS - 1.0)
        b_dlo = -tl.div_rn(b_dz, b_s) - b_dhi
    return tl.where(b_low <= 0.0, b_dlo, 0.0), tl.where(b_high >= 0.0, b_dhi, 0.0)


@triton.jit
def _received(
    d_rounded, direction, b_dy, b_ur, o_w, o_col, m, width,
    LEVELS: tl.constexpr, ROUNDING_ONLY: tl.constexpr, HAS_DIRECTION: tl.constexpr,
):  # fmt: skip
    """Gradient of the rounded weights, and the part of it that goes through to the weights, float32 [R, C]."""
    b_g = tl.load(d_rounded + o_w, mask=m, other=0.0).to(tl.float32)
    if HAS_DIRECTION and ROUNDING_ONLY:
        b_g -= b_dy * tl.load(direction + o_col, mask=o_col < width, other=0.0)[None, :]
    b_g = tl.where(m, b_g, 0.0)
    return b_g, tl.where((b_ur >= 0.0) & (b_ur <= LEVELS - 1.0), b_g, 0.0)


@triton.jit
def _fake_quantize_fwd_kernel(
    value, rows, columns, low, high, direction, offset, rounded, gain,
    height, width, size, groups, chunk,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, STORAGE: tl.constexpr, TINY: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DIRECTION: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUNDING_ONLY: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    i_chunk, i_group = tl.program_id(0), tl.program_id(1)
    o_in = tl.arange(0, G)
    o_col = i_group * size + o_in
    for i in range(0, chunk, R):
        o_row = i_chunk * chunk + i + tl.arange(0, R)
        m_row = o_row < height
        m = m_row[:, None] & (o_in < size)[None, :]
        b_v, b_r, b_c, b_w = _load_weight(value, rows, columns, o_row, o_col, m_row, m, width, HAS_ROWS, HAS_COLUMNS)
        b_min = tl.where(m_row, tl.min(tl.where(m, b_w, float("inf")), axis=1), 0.0)
        b_max = tl.where(m_row, tl.max(tl.where(m, b_w, float("-inf")), axis=1), 0.0)
        o_range = o_row * groups + i_group
        b_a, b_b, b_lo, b_hi, b_s, b_ok, b_zr, b_z = _grid(
            b_min, b_max, m_row, low + o_range, high + o_range, LEVELS, SYMMETRIC, STORAGE, TINY
        )
        o_w = o_row[:, None].to(tl.int64) * width + o_col[None, :]
        b_x, b_ur, b_u = _codes(b_w, b_s, b_z, offset + o_w if HAS_OFFSET else offset, m, LEVELS, HAS_OFFSET)
        b_q = (b_u - b_z[:, None]) * b_s[:, None]
        tl.store(rounded + o_w, b_q.to(rounded.dtype.element_ty), mask=m)
        if HAS_DIRECTION:
            b_d = tl.load(direction + o_col, mask=o_in < size, other=0.0)[None, :]
            b_acting = b_w - b_q if ROUNDING_ONLY else b_w
            tl.store(gain + o_range, tl.sum(tl.where(m, b_acting * b_d, 0.0), axis=1), mask=m_row)


@triton.jit
def _extremes(
    value, rows, columns, o_row, m_row, first, width, size,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Least and greatest weight of each row between columns ``first`` and ``first + size``, float32 [R]."""
    b_least = tl.full([R, C], float("inf"), tl.float32)
    b_most = tl.full([R, C], float("-inf"), tl.float32)
    for i in range(0, size, C):
        o_in = i + tl.arange(0, C)
        m = m_row[:, None] & (o_in < size)[None, :]
        _, _, _, b_w = _load_weight(
            value, rows, columns, o_row, first + o_in, m_row, m, width, HAS_ROWS, HAS_COLUMNS
        )  # fmt: skip
        b_least = tl.minimum(b_least, tl.where(m, b_w, float("inf")))
        b_most = tl.maximum(b_most, tl.where(m, b_w, float("-inf")))
    return tl.where(m_row, tl.min(b_least, axis=1), 0.0), tl.where(m_row, tl.max(b_most, axis=1), 0.0)


@triton.jit
def _range_gradient(
    value, rows, columns, direction, offset, d_rounded, d_offset, o_row, m_row, first, width, size,
    b_dy, b_min, b_max, b_s, b_z,
    LEVELS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DIRECTION: tl.constexpr,
    HAS_OFFSET: tl.constexpr, ROUNDING_ONLY: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of scale and zero, and how many weights are least and greatest, float32 [R]; stores d_offset."""
    b_ds = tl.zeros([R, C], tl.float32)
    b_dz = tl.zeros([R, C], tl.float32)
    b_at_min = tl.zeros([R, C], tl.float32)
    b_at_max = tl.zeros([R, C], tl.float32)
    for i in range(0, size, C):
        o_in = i + tl.arange(0, C)
        o_col = first + o_in
        m = m_row[:, None] & (o_in < size)[None, :]
        _, _, _, b_w = _load_weight(value, rows, columns, o_row, o_col, m_row, m, width, HAS_ROWS, HAS_COLUMNS)
        o_w = o_row[:, None].to(tl.int64) * width + o_col[None, :]
        b_x, b_ur, b_u = _codes(b_w, b_s, b_z, offset + o_w if HAS_OFFSET else offset, m, LEVELS, HAS_OFFSET)
        b_g, b_inside = _received(
            d_rounded, direction, b_dy, b_ur, o_w, o_col, m, width, LEVELS, ROUNDING_ONLY, HAS_DIRECTION
        )
        b_ds += b_g * (b_u - b_z[:, None]) - b_inside * b_x
        b_dz += b_g - b_inside
        b_at_min += tl.where(m & (b_w == b_min[:, None]), 1.0, 0.0)
        b_at_max += tl.where(m & (b_w == b_max[:, None]), 1.0, 0.0)
        if HAS_OFFSET:
            tl.store(d_offset + o_w, b_inside * b_s[:, None], mask=m)
    return tl.sum(b_ds, axis=1), -b_s * tl.sum(b_dz, axis=1), tl.sum(b_at_min, axis=1), tl.sum(b_at_max, axis=1)


@triton.jit
def _fake_quantize_bwd_kernel(
    value, rows, columns, low, high, direction, offset, d_rounded, d_gain,
    d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset,
    height, width, size, groups,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, STORAGE: tl.constexpr, TINY: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DIRECTION: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUNDING_ONLY: tl.constexpr, NEEDS_VALUE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program walks three times over the same group of R rows, C columns at a time: for its extremes, for what its
    range receives, and for what everything else does."""
    i_rows, i_group = tl.program_id(0), tl.program_id(1)
    first = i_group * size
    o_row = i_rows * R + tl.arange(0, R)
    m_row = o_row < height
    o_range = o_row * groups + i_group
    b_min, b_max = _extremes(value, rows, columns, o_row, m_row, first, width, size, HAS_ROWS, HAS_COLUMNS, R, C)
    b_a, b_b, b_lo, b_hi, b_s, b_ok, b_zr, b_z = _grid(
        b_min, b_max, m_row, low + o_range, high + o_range, LEVELS, SYMMETRIC, STORAGE, TINY
    )
    b_dy = tl.load(d_gain + o_row, mask=m_row, other=0.0)[:, None] if HAS_DIRECTION else 0.0
    b_ds, b_dz, b_at_min, b_at_max = _range_gradient(
        value, rows, columns, direction, offset, d_rounded, d_offset, o_row, m_row, first, width, size,
        b_dy, b_min, b_max, b_s, b_z,
        LEVELS, HAS_ROWS, HAS_COLUMNS, HAS_DIRECTION, HAS_OFFSET, ROUNDING_ONLY, R, C,
    )  # fmt: skip
    b_dlo, b_dhi = _ends_gradient(b_ds, b_dz, b_min * b_a, b_max * b_b, b_lo, b_hi, b_s, b_ok, b_zr, LEVELS, SYMMETRIC)
    tl.store(d_low + o_range, b_dlo * b_min, mask=m_row)
    tl.store(d_high + o_range, b_dhi * b_max, mask=m_row)
    b_dmin = (b_dlo * b_a / tl.maximum(b_at_min, 1.0))[:, None]  # shared by weights that tie
    b_dmax = (b_dhi * b_b / tl.maximum(b_at_max, 1.0))[:, None]
    b_dr = tl.zeros([R, C], tl.float32)
    for i in range(0, size, C):
        o_in = i + tl.arange(0, C)
        o_col = first + o_in
        m = m_row[:, None] & (o_in < size)[None, :]
        b_v, b_r, b_c, b_w = _load_weight(value, rows, columns, o_row, o_col, m_row, m, width, HAS_ROWS, HAS_COLUMNS)
        o_w = o_row[:, None].to(tl.int64) * width + o_col[None, :]
        b_x, b_ur, b_u = _codes(b_w, b_s, b_z, offset + o_w if HAS_OFFSET else offset, m, LEVELS, HAS_OFFSET)
        b_g, b_dw = _received(
            d_rounded, direction, b_dy, b_ur, o_w, o_col, m, width, LEVELS, ROUNDING_ONLY, HAS_DIRECTION
        )
        b_dw += tl.where(b_w == b_min[:, None], b_dmin, 0.0) + tl.where(b_w == b_max[:, None], b_dmax, 0.0)
        if HAS_DIRECTION:
            b_dw += b_dy * tl.load(direction + o_col, mask=o_in < size, other=0.0)[None, :]
            b_acting = b_w - (b_u - b_z[:, None]) * b_s[:, None] if ROUNDING_ONLY else b_w
            b_dd = tl.sum(tl.where(m, b_dy * b_acting, 0.0), axis=0)
            tl.store(d_direction + i_rows * width + o_col, b_dd, mask=o_in < size)
        b_dw = tl.where(m, b_dw, 0.0)
        if NEEDS_VALUE:
            tl.store(d_value + o_w, b_dw * b_r * b_c, mask=m)
        if HAS_ROWS:
            b_dr += b_dw * b_v * b_c
        if HAS_COLUMNS:
            tl.store(d_columns + i_rows * width + o_col, tl.sum(b_dw * b_v * b_r, axis=0), mask=o_in < size)
    if HAS_ROWS:
        tl.store(d_rows + o_range, tl.sum(b_dr, axis=1), mask=m_row)


def forward(request: Request) -> tuple[Tensor, Tensor]:
    """As :func:`naive.fake_quantize`; ``low`` is float32."""
    value, low = request.value, request.low
    rounded = torch.empty(value.shape, dtype=request.dtype, device=value.device)
    gain = torch.zeros_like(low)  # (out, groups)
    (R, G, chunk, warps), constants = _plan(request), _constants(request)
    grid = (triton.cdiv(value.shape[0], chunk), low.shape[1])
    _fake_quantize_fwd_kernel[grid](
        value, request.rows, request.columns, low, request.high, request.direction, request.offset, rounded, gain,
        *value.shape, value.shape[1] // low.shape[1], low.shape[1], chunk, R=R, G=G, num_warps=warps, **constants,
    )  # fmt: skip
    return rounded, gain.sum(1)


def backward(request: Request, d_rounded: Tensor, d_gain: Tensor, needs_value: bool) -> list[Tensor]:
    """Gradients of value, rows, columns, low, high, direction, offset; empty where there is none."""
    value, rows, columns, low, high, direction, offset = request[:7]
    (height, width), groups = value.shape, low.shape[1]
    R, C = _ROWS, min(_SPAN, triton.next_power_of_2(width // groups))
    chunks = triton.cdiv(height, R)
    d_value = low.new_empty((height, width) if needs_value else (0,))
    d_rows = low.new_empty((0,) if rows is None else (height, groups))
    d_columns = low.new_empty((0,) if columns is None else (chunks, width))
    d_direction = low.new_empty((0,) if direction is None else (chunks, width))
    d_offset = low.new_empty((0,) if offset is None else (height, width))
    d_low, d_high = torch.empty_like(low), torch.empty_like(high)
    _fake_quantize_bwd_kernel[(chunks, groups)](
        value, rows, columns, low, high, direction, offset, d_rounded.contiguous(), d_gain.contiguous(),
        d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset,
        height, width, width // groups, groups,
        NEEDS_VALUE=needs_value, R=R, C=C, num_warps=_WARPS, **_constants(request),
    )  # fmt: skip
    d_rows = d_rows if rows is None else d_rows.sum(1)
    d_columns = d_columns if columns is None else d_columns.sum(0)
    d_direction = d_direction if direction is None else d_direction.sum(0)
    return [d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset]


def _plan(request: Request) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, rows of a program, warps."""
    groups = request.low.shape[1]
    columns = triton.next_power_of_2(request.value.shape[1] // groups)
    rows = max(1, _TILE // columns)
    return rows, columns, max(rows, _CHUNK if groups == 1 else 64), 8 if columns <= _TILE else 16


def _constants(request: Request) -> dict[str, object]:
    """What a kernel is compiled for."""
    return {
        "LEVELS": request.grid.levels,
        "SYMMETRIC": request.grid.symmetric,
        "STORAGE": _STORAGE[request.storage],
        "TINY": torch.finfo(request.storage).smallest_normal,
        "HAS_ROWS": request.rows is not None,
        "HAS_COLUMNS": request.columns is not None,
        "HAS_DIRECTION": request.direction is not None,
        "HAS_OFFSET": request.offset is not None,
        "ROUNDING_ONLY": request.rounding_only,
    }
