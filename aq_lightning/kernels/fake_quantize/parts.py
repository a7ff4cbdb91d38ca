"""What both passes share, with rounding and division to the last bit what PyTorch computes.

But without the branches that ``tl.div_rn`` would have for each weight: it remains for what is divided once per group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aq_lightning.kernels.fake_quantize.naive import Request

_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds half to even, below 2^22


@triton.jit
def round_even(x):
    """Half to even; for numbers below 2^22; greater ones are clamped anyway."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def reciprocal(b_s):
    """1 / s to its last bit: the approximate quotient of a GPU, corrected once by the remainder."""
    b_y = 1.0 / b_s
    return tl.fma(tl.fma(-b_y, b_s, 1.0), b_y, b_y)


@triton.jit
def divide(b_a, b_s, b_y):
    """a / s as IEEE 754 rounds it, y = 1 / s: what the remainder says corrects the first quotient (Markstein 1990)."""
    b_q = b_a * b_y
    return tl.fma(tl.fma(b_q, -b_s, b_a), b_y, b_q)


@triton.jit
def load(vector, o, m, THERE: tl.constexpr, ABSENT: tl.constexpr):
    """A vector that may be absent, float32 [C]."""
    return tl.load(vector + o, mask=m, other=0.0) if THERE else tl.full(o.shape, ABSENT, tl.float32)


@triton.jit
def load_weight(value, b_r, b_c, o_w, m):
    """b_v and b_w = r v c, float32 [R, C]; r [R], c [C]."""
    b_v = tl.load(value + o_w, mask=m, other=0.0).to(tl.float32)
    return b_v, b_v * b_r[:, None] * b_c[None, :]


@triton.jit
def codes(b_w, b_s, b_y, b_z, p_offset, m, LEVELS: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """Weights in steps, and their codes before and after the clamp, float32 [R, G]."""
    b_x = divide(b_w, b_s[:, None], b_y[:, None])
    b_o = tl.load(p_offset, mask=m, other=0.0).to(tl.float32) if HAS_OFFSET else 0.0
    b_ur = round_even(b_x + b_o) + b_z[:, None]
    return b_x, b_ur, tl.minimum(tl.maximum(b_ur, 0.0), LEVELS - 1.0)


def constants(request: Request) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "LEVELS": request.grid.levels,
        "SYMMETRIC": request.grid.symmetric,
        "HAS_ROWS": request.rows is not None,
        "HAS_COLUMNS": request.columns is not None,
        "HAS_DIRECTION": request.direction is not None,
        "HAS_OFFSET": request.offset is not None,
        "ROUNDING_ONLY": request.rounding_only,
    }
