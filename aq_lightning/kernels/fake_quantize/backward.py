"""One pass over the weight for the gradients of all that a fake quantization reads.

Groups larger than what a program holds take a second look at the few spans that hold their least and greatest weights:
what these receive is known only when all of a group has been seen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aq_lightning.kernels.fake_quantize.naive import Request
from aq_lightning.kernels.fake_quantize.parts import codes, constants, load, load_weight, reciprocal

_WHOLE = 512  # columns up to which a program holds whole groups
_SPAN = 128  # columns that it holds of a greater group
_HELD = 1024  # elements that it then holds at once
_CHUNK = 64  # rows that it visits at least, so that sums over rows stay few
_ROWS = 32  # groups whose spans a program adds up
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
def _received(d_rounded, b_d, b_dy, b_ur, b_u, o_w, m, ROUNDING_ONLY: tl.constexpr, HAS_DIRECTION: tl.constexpr):
    """Gradient of the rounded weights, and what goes through to the weights: that of codes which the clamp left alone,
    float32 [R, C]."""
    b_g = tl.load(d_rounded + o_w, mask=m, other=0.0).to(tl.float32)
    if HAS_DIRECTION and ROUNDING_ONLY:
        b_g -= b_dy[:, None] * b_d[None, :]
    return b_g, tl.where(b_ur == b_u, b_g, 0.0)


@triton.jit
def _known(found, o_range, m_row, LEVELS: tl.constexpr):
    """What the forward pass found of groups, [R] each: least and greatest weight, scale, its reciprocal, whether the
    range is more than a point, zero before and after its clamp."""
    p_found = found + o_range * 4
    b_min = tl.load(p_found, mask=m_row, other=0.0)
    b_max = tl.load(p_found + 1, mask=m_row, other=0.0)
    b_s = tl.load(p_found + 2, mask=m_row, other=1.0)
    b_zr = tl.load(p_found + 3, mask=m_row, other=0.0)
    b_ok, b_s = b_s > 0, tl.abs(b_s)
    return b_min, b_max, b_s, reciprocal(b_s), b_ok, b_zr, tl.minimum(tl.maximum(b_zr, 0.0), LEVELS - 1.0)


@triton.jit
def _counts(b_ties):
    """How many weights are least and how many greatest, of sums of 1 for the former and 4096 for the latter."""
    b_at_max = tl.floor(b_ties * (1 / 4096))
    return b_ties - b_at_max * 4096, b_at_max


@triton.jit
def _ends(
    low, high, d_low, d_high, o_range, m_row, b_ds, b_dz, b_at_min, b_at_max, b_min, b_max, b_s, b_y, b_ok, b_zr,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """What each of the least and each of the greatest weights of a group receives, [R]; stores the fractions'
    gradients.

    Args:
        b_ds, b_dz: sums over a group for its scale and, without the factor −s, its zero.
        b_at_min, b_at_max: how many are least and greatest.
    """
    b_a = tl.load(low + o_range, mask=m_row, other=1.0)
    b_b = tl.load(high + o_range, mask=m_row, other=1.0)
    b_dlo, b_dhi = _ends_gradient(b_ds, -b_s * b_dz, b_min * b_a, b_max * b_b, b_y, b_ok, b_zr, LEVELS, SYMMETRIC)
    tl.store(d_low + o_range, b_dlo * b_min, mask=m_row)
    tl.store(d_high + o_range, b_dhi * b_max, mask=m_row)
    b_dmin = b_dlo * b_a * reciprocal(tl.maximum(b_at_min, 1.0))
    return b_dmin, b_dhi * b_b * reciprocal(tl.maximum(b_at_max, 1.0))


@triton.jit
def _at_ends(b_w, b_min, b_max, b_dmin, b_dmax):
    """Gradients of the least and the greatest weights, where these are, like ``b_w``; the others broadcast to it."""
    return tl.where(b_w == b_min, b_dmin, 0.0) + tl.where(b_w == b_max, b_dmax, 0.0)


@triton.jit
def _fake_quantize_bwd_kernel(
    value, rows, columns, low, high, direction, offset, found, d_rounded, d_gain,
    d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset, sums,
    height, width, size, groups, spans, chunk,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    HAS_DIRECTION: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUNDING_ONLY: tl.constexpr, NEEDS_VALUE: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program visits ``chunk`` rows of C columns, R at a time: a group, or one of its ``spans``, whose sums it then
    leaves for :func:`_ends_kernel` in ``sums``, (height, groups · spans, 3)."""
    i_chunk, i_span = tl.program_id(0), tl.program_id(1)
    o_in = (i_span % spans) * C + tl.arange(0, C)
    o_column, m_column = i_span // spans * size + o_in, o_in < size
    b_c = load(columns, o_column, m_column, HAS_COLUMNS, 1.0)
    b_d = load(direction, o_column, m_column, HAS_DIRECTION, 0.0)
    b_dc, b_dd = tl.zeros([R, C], tl.float32), tl.zeros([R, C], tl.float32)
    for i in range(0, chunk, R):
        o_row = i_chunk * chunk + i + tl.arange(0, R)
        m_row = o_row < height
        m = m_row[:, None] if EVEN else m_row[:, None] & m_column[None, :]
        o_w = o_row[:, None].to(tl.int64) * width + o_column[None, :]
        o_range, o_sum = o_row * groups + i_span // spans, o_row * (groups * spans) + i_span
        b_min, b_max, b_s, b_y, b_ok, b_zr, b_z = _known(found, o_range, m_row, LEVELS)
        b_r, b_dy = load(rows, o_row, m_row, HAS_ROWS, 1.0), load(d_gain, o_row, m_row, HAS_DIRECTION, 0.0)
        b_v, b_w = load_weight(value, b_r, b_c, o_w, m)
        p_offset = offset + o_w if HAS_OFFSET else offset
        b_x, b_ur, b_u = codes(b_w, b_s, b_y, b_z, p_offset, m, LEVELS, HAS_OFFSET)
        b_g, b_dw = _received(d_rounded, b_d, b_dy, b_ur, b_u, o_w, m, ROUNDING_ONLY, HAS_DIRECTION)
        if HAS_OFFSET:
            tl.store(d_offset + o_w, b_dw * b_s[:, None], mask=m)
        b_ds = tl.sum(b_g * (b_u - b_z[:, None]) - b_dw * b_x, axis=1)
        b_dz = tl.sum(b_g - b_dw, axis=1)
        b_tie = tl.where(b_w == b_min[:, None], 1.0, 0.0) + tl.where(b_w == b_max[:, None], 4096.0, 0.0)
        b_ties = tl.sum(b_tie if EVEN else tl.where(m, b_tie, 0.0), axis=1)
        if WHOLE:
            b_at_min, b_at_max = _counts(b_ties)
            b_dmin, b_dmax = _ends(
                low, high, d_low, d_high, o_range, m_row, b_ds, b_dz, b_at_min, b_at_max, b_min, b_max, b_s, b_y, b_ok,
                b_zr, LEVELS, SYMMETRIC,
            )  # fmt: skip
            b_dw += _at_ends(b_w, b_min[:, None], b_max[:, None], b_dmin[:, None], b_dmax[:, None])
        else:
            tl.store(sums + o_sum * 3, b_ds, mask=m_row)
            tl.store(sums + o_sum * 3 + 1, b_dz, mask=m_row)
            tl.store(sums + o_sum * 3 + 2, b_ties, mask=m_row)
        if HAS_DIRECTION:
            b_dw += b_dy[:, None] * b_d[None, :]
            b_dd += b_dy[:, None] * (b_w - (b_u - b_z[:, None]) * b_s[:, None] if ROUNDING_ONLY else b_w)
        if NEEDS_VALUE:
            tl.store(d_value + o_w, b_dw * b_r[:, None] * b_c[None, :], mask=m)
        if HAS_ROWS:
            tl.store(d_rows + o_sum, tl.sum(b_dw * b_v * b_c[None, :], axis=1), mask=m_row)
        b_dc += b_dw * b_v * b_r[:, None]
    if HAS_COLUMNS:
        tl.store(d_columns + i_chunk * width + o_column, tl.sum(b_dc, axis=0), mask=m_column)
    if HAS_DIRECTION:
        tl.store(d_direction + i_chunk * width + o_column, tl.sum(b_dd, axis=0), mask=m_column)


@triton.jit
def _ends_kernel(
    low, high, found, d_low, d_high, sums, d_ends, height, groups, spans,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, R: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Adds up what the spans of R groups left, and stores what each least and each greatest weight receives in
    ``d_ends``, (height, groups, 2); SPANS: the power of 2 that ``spans`` is at most."""
    o = tl.program_id(0) * R + tl.arange(0, R)
    m, o_span = o < height * groups, tl.arange(0, SPANS)
    p_sums = sums + (o[:, None] * spans + o_span[None, :]) * 3
    m_sums = m[:, None] & (o_span < spans)[None, :]
    b_ds = tl.sum(tl.load(p_sums, mask=m_sums, other=0.0), axis=1)
    b_dz = tl.sum(tl.load(p_sums + 1, mask=m_sums, other=0.0), axis=1)
    b_at_min, b_at_max = _counts(tl.load(p_sums + 2, mask=m_sums, other=0.0))  # of a span each: exact
    b_at_min, b_at_max = tl.sum(b_at_min, axis=1), tl.sum(b_at_max, axis=1)
    b_min, b_max, b_s, b_y, b_ok, b_zr, b_z = _known(found, o, m, LEVELS)
    b_dmin, b_dmax = _ends(
        low, high, d_low, d_high, o, m, b_ds, b_dz, b_at_min, b_at_max, b_min, b_max, b_s, b_y, b_ok, b_zr,
        LEVELS, SYMMETRIC,
    )  # fmt: skip
    tl.store(d_ends + o * 2, b_dmin, mask=m)
    tl.store(d_ends + o * 2 + 1, b_dmax, mask=m)


@triton.jit
def _at_ends_kernel(
    value, rows, columns, found, d_ends, sums, d_value, d_rows, d_columns, height, width, size, groups, spans,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, NEEDS_VALUE: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Adds what the least and the greatest weights receive to what :func:`_fake_quantize_bwd_kernel` left in the same
    places; of CHUNK rows it visits those whose span holds one."""
    i_chunk, i_span = tl.program_id(0), tl.program_id(1)
    o_in = (i_span % spans) * C + tl.arange(0, C)
    o_column, m = i_span // spans * size + o_in, o_in < size
    b_c = load(columns, o_column, m, HAS_COLUMNS, 1.0)
    b_dc = tl.zeros([C], tl.float32)
    o_rows = i_chunk * CHUNK + tl.arange(0, CHUNK)
    m_rows = o_rows < height
    b_ties = tl.load(sums + (o_rows * (groups * spans) + i_span) * 3 + 2, mask=m_rows, other=0.0)
    visited = tl.sum((b_ties > 0).to(tl.int32), axis=0)
    o_left = tl.where(b_ties > 0, o_rows, height)
    for _ in range(visited):
        i_row = tl.min(o_left, axis=0)
        o_left = tl.where(o_left == i_row, height, o_left)
        o_w, o_range = i_row.to(tl.int64) * width + o_column, i_row * groups + i_span // spans
        b_r = tl.load(rows + i_row) if HAS_ROWS else 1.0
        b_v = tl.load(value + o_w, mask=m, other=0.0).to(tl.float32)
        b_w = b_v * b_r * b_c
        b_min, b_max = tl.load(found + o_range * 4), tl.load(found + o_range * 4 + 1)
        b_dmin, b_dmax = tl.load(d_ends + o_range * 2), tl.load(d_ends + o_range * 2 + 1)
        b_dw = tl.where(m, _at_ends(b_w, b_min, b_max, b_dmin, b_dmax), 0.0)
        if NEEDS_VALUE:
            b_before = tl.load(d_value + o_w, mask=m, other=0.0)
            tl.store(d_value + o_w, b_before + b_dw * b_r * b_c, mask=m)
        if HAS_ROWS:
            p_rows = d_rows + i_row * (groups * spans) + i_span
            tl.store(p_rows, tl.load(p_rows) + tl.sum(b_dw * b_v * b_c, axis=0))
        b_dc += b_dw * b_v * b_r
    if HAS_COLUMNS and visited > 0:
        p_columns = d_columns + i_chunk * width + o_column
        b_before = tl.load(p_columns, mask=m, other=0.0)
        tl.store(p_columns, b_before + b_dc, mask=m)


def backward(request: Request, found: Tensor, d_rounded: Tensor, d_gain: Tensor, needs_value: bool) -> list[Tensor]:
    """Gradients of value, rows, columns, low, high, direction, offset; empty where there is none."""
    value, rows, columns, low, high, direction, offset = request[:7]
    (height, width), groups = value.shape, low.shape[1]
    size = width // groups
    C = triton.next_power_of_2(size) if size <= _WHOLE else _SPAN
    spans, R = triton.cdiv(size, C), max(1, _HELD // C)
    chunk = max(R, _CHUNK)
    chunks = triton.cdiv(height, chunk)
    d_value = low.new_empty((height, width) if needs_value else (0,))
    d_rows = low.new_empty((0,) if rows is None else (height, groups * spans))
    d_columns = low.new_empty((0,) if columns is None else (chunks, width))
    d_direction = low.new_empty((0,) if direction is None else (chunks, width))
    d_offset = low.new_empty((0,) if offset is None else (height, width))
    d_low, d_high = torch.empty_like(low), torch.empty_like(high)
    sums = low.new_empty((0,) if spans == 1 else (height, groups * spans, 3))
    grid, sizes, known = (chunks, groups * spans), (height, width, size, groups, spans, chunk), constants(request)
    cut = {"NEEDS_VALUE": needs_value, "EVEN": size % C == 0, "R": R, "C": C, "num_warps": _WARPS}
    _fake_quantize_bwd_kernel[grid](
        value, rows, columns, low, high, direction, offset, found, d_rounded.contiguous(), d_gain.contiguous(),
        d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset, sums, *sizes,
        WHOLE=spans == 1, **cut, **known,
    )  # fmt: skip
    if spans > 1:
        d_ends = low.new_empty(height, groups, 2)
        _ends_kernel[(triton.cdiv(height * groups, _ROWS),)](
            low, high, found, d_low, d_high, sums, d_ends, height, groups, spans,
            LEVELS=known["LEVELS"], SYMMETRIC=known["SYMMETRIC"], R=_ROWS, SPANS=triton.next_power_of_2(spans),
        )  # fmt: skip
    if spans > 1 and (needs_value or rows is not None or columns is not None):
        _at_ends_kernel[grid](
            value, rows, columns, found, d_ends, sums, d_value, d_rows, d_columns, *sizes[:-1],
            HAS_ROWS=known["HAS_ROWS"], HAS_COLUMNS=known["HAS_COLUMNS"], NEEDS_VALUE=needs_value,
            CHUNK=chunk, C=C, num_warps=1,
        )  # fmt: skip
    d_rows = d_rows if rows is None else d_rows.sum(1)
    d_columns = d_columns if columns is None else d_columns.sum(0)
    d_direction = d_direction if direction is None else d_direction.sum(0)
    return [d_value, d_rows, d_columns, d_low, d_high, d_direction, d_offset]
