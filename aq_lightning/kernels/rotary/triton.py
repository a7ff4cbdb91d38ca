"""Rotary position embedding in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # numbers of each half that a program turns


@triton.jit
def _turn(x, y, x_stride, y_stride, cos, sin, i_h, H, half, BH: tl.constexpr, BN: tl.constexpr):
    """BH heads of one token: x and y point at its head 0, their strides lead to the next."""
    o_h = i_h * BH + tl.arange(0, BH)[:, None].to(tl.int64)
    o_n = tl.arange(0, BN)[None, :]
    m_n = o_n < half
    m_x = (o_h < H) & m_n
    b_a = tl.load(x + o_h * x_stride + o_n, mask=m_x, other=0.0).to(tl.float32)
    b_b = tl.load(x + o_h * x_stride + half + o_n, mask=m_x, other=0.0).to(tl.float32)
    b_cos = tl.load(cos + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_y = b_a * b_cos - b_b * b_sin
    tl.store(y + o_h * y_stride + o_n, b_y.to(y.dtype.element_ty), mask=m_x)
    b_cos = tl.load(cos + half + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + half + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_y = b_b * b_cos + b_a * b_sin
    tl.store(y + o_h * y_stride + half + o_n, b_y.to(y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["T"])
def _rotary_kernel(
    q, k, q_y, k_y, cos, sin,
    q_b, q_h, q_t, k_b, k_h, k_t, qy_b, qy_h, qy_t, ky_b, ky_h, ky_t, cos_b, cos_t, sin_b, sin_t,
    T, Q, K, half, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BH of the Q query heads or of the K key heads of one token; strides by batch, head and token."""
    i_b = (tl.program_id(0) // T).to(tl.int64)
    i_t = (tl.program_id(0) % T).to(tl.int64)
    i_h = tl.program_id(1)
    n_q = tl.cdiv(Q, BH)
    p_cos = cos + i_b * cos_b + i_t * cos_t
    p_sin = sin + i_b * sin_b + i_t * sin_t
    if i_h < n_q:
        p_x, p_y = q + i_b * q_b + i_t * q_t, q_y + i_b * qy_b + i_t * qy_t
        _turn(p_x, p_y, q_h, qy_h, p_cos, p_sin, i_h, Q, half, BH, BN)
    else:
        p_x, p_y = k + i_b * k_b + i_t * k_t, k_y + i_b * ky_b + i_t * ky_t
        _turn(p_x, p_y, k_h, ky_h, p_cos, p_sin, i_h - n_q, K, half, BH, BN)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`naive.rotary` rounded once, of tensors whose last dimension is even and lies together.

    Args:
        q, k: (batch, heads, tokens, size), each with heads of its own number.
        cos, sin: (batch or 1, tokens, size).

    Returns:
        Tensors without gaps, their dimensions in the order of q and k in memory.
    """
    batch, heads, tokens, size = q.shape
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    y = torch.empty_like(q), torch.empty_like(k)
    columns = triton.next_power_of_2(size // 2)
    rows = min(max(1, _BLOCK // columns), triton.next_power_of_2(max(heads, k.shape[1])))
    grid = batch * tokens, triton.cdiv(heads, rows) + triton.cdiv(k.shape[1], rows)
    strides = [stride for tensor in (q, k, *y, cos, sin) for stride in tensor.stride()[:-1]]
    numbers = tokens, heads, k.shape[1], size // 2
    _rotary_kernel[grid](q, k, *y, cos, sin, *strides, *numbers, BH=rows, BN=columns)
    return y
