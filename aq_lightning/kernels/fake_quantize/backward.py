"""One pass over the weight, or two if its groups are large, for the gradients of all that a fake quantization reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aq_lightning.kernels.fake_quantize.naive import Request
from aq_lightning.kernels.fake_quantize.parts import codes, constants, load, load_weight, reciprocal

_WHOLE = 512  # columns up to which a program holds whole groups
_HELD = 1024  # elements that it then holds at once
_CHUNK = 64  # rows that it then visits, so that sums over rows stay few
_SPAN = 128  # columns that a program holds of a greater group
_ROWS = 16  # rows that it then visits
_WARPS = 4


@triton.jit
def _ends_gradient(
    b_ds, b_dz, b_low, b_high, b_y, b_ok, b_zr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr
):  # fmt: skip
    """Gradients of the range's ends before they were made to contain 0, from those of scale and zero, all [R]."""
    b_lo, b_hi = tl.minimum(b_low, 0.0), tl.maximum(b_high, 0.0)
    if SYMMETRIC:
        b_ds = tl.where(b_ok, b_ds, 0.0) * (2 / (LEVELS - 1))
        b_dhi = tl.where(b_hi > -b_lo, b_ds, tl.where(b_hi == -b_lo, b_ds * 0.5, 0.0))
        b_dlo = b_dhi - b_ds
    else:
        b_dz = tl.where((b_zr >= 0.0) & (b_zr <= LEVELS - 1.0), b_dz, 0.0)
        b_ds += b_dz * (b_lo * b_y * b_y)
        b_dhi = tl.where(b_ok, b_ds, 0.0) * (1 / (LEVELS - 1))
        b_dlo = -b_dz * b_y - b_dhi
    return tl.where(b_low <= 0.0, b_dlo, 0.0), tl.where(b_high >= 0.0, b_dhi, 0.0)


@triton.jit
def _received(
    d_rounded, b_d, b_dy, b_ur, o_w, m, LEVELS: tl.constexpr, ROUNDING_ONLY: tl.constexpr, HAS_DIRECTION: tl.constexpr
):
    """Gradient of the rounded weights, and the part of it that goes through to the weights, float32 [R, C]."""
    b_g = tl.load(d_rounded + o_w, mask=m, other=0.0).to(tl.float32)
    if HAS_DIRECTION and ROUNDING_ONLY:
        b_g -= b_dy[:, None] * b_d[None, :]
    return b_g, tl.where((b_ur >= 0.0) & (b_ur <= LEVELS - 1.0), b_g, 0.0)


@triton.jit
def _plus(b_sum, b_part, ALONE: tl.constexpr):
    """The sum with another part, which is the only one where the compiler may know it."""
    return b_part if ALONE else b_sum + b_part


@triton.jit
def _store_sums(
    d_columns, d_direction, b_dc, b_dd, o, m, HAS_COLUMNS: tl.constexpr, HAS_DIRECTION: tl.constexpr
):  # fmt: skip
    """Sums over the rows of a program, [R, C] each."""
    if HAS_COLUMNS:
        tl.store(d_columns + o, tl.sum(b_dc, axis=0), mask=m)
    if HAS_DIRECTION:
        tl.store(d_direction + o, tl.sum(b_dd, axis=0), mask=m)


@triton.jit
def _seen(
    value, columns, direction, offset, d_rounded, j, o_row, m_row, first, width, size,
    b_r, b_c, b_d, b_dy, b_s, b_y, b_z,
    LEVELS: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DIRECTION: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUNDING_ONLY: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What both walks see of C columns from ``j`` on: where they lie, weights, codes, and what these receive."""
    o_in = j + tl.arange(0, C)
    m = m_row[:, None] if EVEN else m_row[:, None] & (o_in < size)[None, :]
    o_w = o_row[:, None].to(tl.int64) * width + first + o_in[None, :]
    if not WHOLE:
        b_c = load(columns, first + o_in, o_in < size, HAS_COLUMNS, 1.0)
        b_d = load(direction, first + o_in, o_in < size, HAS_DIRECTION, 0.0)
    b_v, b_w = load_weight(value, b_r, b_c, o_w, m)
    p_offset = offset + o_w if HAS_OFFSET else offset
    b_x, b_ur, b_u = codes(b_w, b_s, b_y, b_z, p_offset, m, LEVELS, HAS_OFFSET)
    b_g, b_dw = _received(d_rounded, b_d, b_dy, b_ur, o_w, m, LEVELS, ROUNDING_ONLY, HAS_DIRECTION)
    return o_in, o_w, m, b_c, b_d, b_v, b_w, b_x, b_u, b_g, b_dw


@triton.jit
def _range_gradient(
    value, columns, direction, offset, d_rounded, o_row, m_row, first, width, size,
    b_r, b_c, b_d, b_dy, b_min, b_max, b_s, b_y, b_z,
    LEVELS: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DIRECTION: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUNDING_ONLY: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of scale and zero, and how many weights are least and greatest, at least 1, float32 [R]."""
    b_ds = tl.zeros([R, C], tl.float32)
    b_dz = tl.zeros([R, C], tl.float32)
    b_ties = tl.zeros([R, C], tl.float32)  # with the least weight, and 4096 times with the greatest
    for j in range(0, C if WHOLE else size, C):
        o_in, o_w, m, b_c, b_d, b_v, b_w, b_x, b_u, b_g, b_dw = _seen(
            value, columns, direction, offset, d_rounded, j, o_row, m_row, first, width, size,
            b_r, b_c, b_d, b_dy, b_s, b_y, b_z,
            LEVELS, HAS_COLUMNS, HAS_DIRECTION, HAS_OFFSET, ROUNDING_ONLY, EVEN, WHOLE, C,
        )  # fmt: skip
        b_ds = _plus(b_ds, b_g * (b_u - b_z[:, None]) - b_dw * b_x, WHOLE)
        b_dz = _plus(b_dz, b_g - b_dw, WHOLE)
        b_tie = tl.where(b_w == b_min[:, None], 1.0, 0.0) + tl.where(b_w == b_max[:, None], 4096.0, 0.0)
        b_ties = _plus(b_ties, b_tie if EVEN else tl.where(m, b_tie, 0.0), WHOLE)
    b_ties = tl.sum(b_ties, axis=1)
    b_at_max = tl.floor(b_ties * (1 / 4096))
    b_at_min = b_ties - b_at_max * 4096
    b_dz = -b_s * tl.sum(b_dz, axis=1)
    return tl.sum(b_ds, axis=1), b_dz, tl.maximum(b_at_min, 1.0), tl.maximum(b_at_max, 1.0)


@triton.jit
def _rest(
    value, columns, direction, offset, d_rounded, d_value, d_columns, d_direction, d_offset,
    o_row, m_row, i_chunk, first, width, size, b_r, b_c, b_d, b_dy, b_min, b_max, b_s, b_y, b_z,
    b_dmin, b_dmax, b_dc, b_dd,
    LEVELS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DIRECTION: tl.constexpr,
    HAS_OFFSET: tl.constexpr, ROUNDING_ONLY: tl.constexpr, NEEDS_VALUE: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of everything but the range, whose ends pass theirs, ``b_dmin`` and ``b_dmax`` [R], to the weights that
    are least and greatest; returns those of rows, columns and direction, not summed, float32 [R, C]."""
    b_dr = tl.zeros([R, C], tl.float32)
    for j in range(0, C if WHOLE else size, C):
        o_in, o_w, m, b_c, b_d, b_v, b_w, b_x, b_u, b_g, b_dw = _seen(
            value, columns, direction, offset, d_rounded, j, o_row, m_row, first, width, size,
            b_r, b_c, b_d, b_dy, b_s, b_y, b_z,
            LEVELS, HAS_COLUMNS, HAS_DIRECTION, HAS_OFFSET, ROUNDING_ONLY, EVEN, WHOLE, C,
        )  # fmt: skip
        if HAS_OFFSET:
            tl.store(d_offset + o_w, b_dw * b_s[:, None], mask=m)
        b_dw += tl.where(b_w == b_min[:, None], b_dmin[:, None], 0.0)
        b_dw += tl.where(b_w == b_max[:, None], b_dmax[:, None], 0.0)
        if HAS_DIRECTION:
            b_dw += b_dy[:, None] * b_d[None, :]
            b_acting = b_w - (b_u - b_z[:, None]) * b_s[:, None] if ROUNDING_ONLY else b_w
            b_dd += b_dy[:, None] * b_acting
        if NEEDS_VALUE:
            tl.store(d_value + o_w, b_dw * b_r[:, None] * b_c[None, :], mask=m)
        if HAS_ROWS:
            b_dr = _plus(b_dr, b_dw * b_v * b_c[None, :], WHOLE)
        b_dc += b_dw * b_v * b_r[:, None]
        if not WHOLE:
            o = i_chunk * width + first + o_in
            _store_sums(d_columns, d_direction, b_dc, b_dd, o, o_in < size, HAS_COLUMNS, HAS_DIRECTION)
            b_dc = tl.zeros([R, C], tl.float32)
            b_dd = tl.zeros([R, C], tl.float32)
    return b_dr, b_dc, b_dd


@triton.jit
def _fake_quantize_bwd_kernel(
    value, rows, columns, low, high, direction, offset, found, d_rounded, d_gain,
    d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset,
    height, width, size, groups, chunk,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    HAS_DIRECTION: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUNDING_ONLY: tl.constexpr, NEEDS_VALUE: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program walks twice over the groups of R rows, C columns at a time: for what their ranges receive, and for what
    everything else does. Of whole groups one walk is left, and sums over rows are stored when all rows are done."""
    i_chunk, first = tl.program_id(0), tl.program_id(1) * size
    b_c = load(columns, first + tl.arange(0, C), tl.arange(0, C) < size, HAS_COLUMNS, 1.0)
    b_d = load(direction, first + tl.arange(0, C), tl.arange(0, C) < size, HAS_DIRECTION, 0.0)
    b_dc = tl.zeros([R, C], tl.float32)
    b_dd = tl.zeros([R, C], tl.float32)
    for i in range(0, chunk, R):
        o_row = i_chunk * chunk + i + tl.arange(0, R)
        m_row = o_row < height
        o_range = o_row * groups + tl.program_id(1)
        p_found = found + o_range * 4
        b_min = tl.load(p_found, mask=m_row, other=0.0)
        b_max = tl.load(p_found + 1, mask=m_row, other=0.0)
        b_s = tl.load(p_found + 2, mask=m_row, other=1.0)
        b_zr = tl.load(p_found + 3, mask=m_row, other=0.0)
        b_ok, b_s = b_s > 0, tl.abs(b_s)
        b_y, b_z = reciprocal(b_s), tl.minimum(tl.maximum(b_zr, 0.0), LEVELS - 1.0)
        b_r, b_dy = load(rows, o_row, m_row, HAS_ROWS, 1.0), load(d_gain, o_row, m_row, HAS_DIRECTION, 0.0)
        b_ds, b_dz, b_at_min, b_at_max = _range_gradient(
            value, columns, direction, offset, d_rounded, o_row, m_row, first, width, size,
            b_r, b_c, b_d, b_dy, b_min, b_max, b_s, b_y, b_z,
            LEVELS, HAS_COLUMNS, HAS_DIRECTION, HAS_OFFSET, ROUNDING_ONLY, EVEN, WHOLE, R, C,
        )  # fmt: skip
        b_a = tl.load(low + o_range, mask=m_row, other=1.0)
        b_b = tl.load(high + o_range, mask=m_row, other=1.0)
        b_dlo, b_dhi = _ends_gradient(b_ds, b_dz, b_min * b_a, b_max * b_b, b_y, b_ok, b_zr, LEVELS, SYMMETRIC)
        b_dr, b_dc, b_dd = _rest(
            value, columns, direction, offset, d_rounded, d_value, d_columns, d_direction, d_offset,
            o_row, m_row, i_chunk, first, width, size, b_r, b_c, b_d, b_dy, b_min, b_max, b_s, b_y, b_z,
            b_dlo * b_a * reciprocal(b_at_min), b_dhi * b_b * reciprocal(b_at_max), b_dc, b_dd,
            LEVELS, HAS_ROWS, HAS_COLUMNS, HAS_DIRECTION, HAS_OFFSET, ROUNDING_ONLY, NEEDS_VALUE, EVEN, WHOLE, R, C,
        )  # fmt: skip
        tl.store(d_low + o_range, b_dlo * b_min, mask=m_row)
        tl.store(d_high + o_range, b_dhi * b_max, mask=m_row)
        if HAS_ROWS:
            tl.store(d_rows + o_range, tl.sum(b_dr, axis=1), mask=m_row)
    if WHOLE:
        o = i_chunk * width + first + tl.arange(0, C)
        _store_sums(d_columns, d_direction, b_dc, b_dd, o, tl.arange(0, C) < size, HAS_COLUMNS, HAS_DIRECTION)


def backward(request: Request, found: Tensor, d_rounded: Tensor, d_gain: Tensor, needs_value: bool) -> list[Tensor]:
    """Gradients of value, rows, columns, low, high, direction, offset; empty where there is none."""
    value, rows, columns, low, high, direction, offset = request[:7]
    (height, width), groups = value.shape, low.shape[1]
    size = width // groups
    whole = size <= _WHOLE
    C = triton.next_power_of_2(size) if whole else _SPAN
    R, chunk = (max(1, _HELD // C), _CHUNK) if whole else (_ROWS, _ROWS)
    chunks = triton.cdiv(height, chunk)
    d_value = low.new_empty((height, width) if needs_value else (0,))
    d_rows = low.new_empty((0,) if rows is None else (height, groups))
    d_columns = low.new_empty((0,) if columns is None else (chunks, width))
    d_direction = low.new_empty((0,) if direction is None else (chunks, width))
    d_offset = low.new_empty((0,) if offset is None else (height, width))
    d_low, d_high = torch.empty_like(low), torch.empty_like(high)
    _fake_quantize_bwd_kernel[(chunks, groups)](
        value, rows, columns, low, high, direction, offset, found, d_rounded.contiguous(), d_gain.contiguous(),
        d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset,
        height, width, size, groups, chunk, NEEDS_VALUE=needs_value, EVEN=size % C == 0, WHOLE=whole, R=R, C=C,
        num_warps=_WARPS, **constants(request),
    )  # fmt: skip
    d_rows = d_rows if rows is None else d_rows.sum(1)
    d_columns = d_columns if columns is None else d_columns.sum(0)
    d_direction = d_direction if direction is None else d_direction.sum(0)
    return [d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset]
