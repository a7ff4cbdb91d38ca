"""A norm by the root mean square in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 16  # of a thread, at most


@triton.jit
def _rms_norm_kernel(x, weight, y, epsilon, share, N, BLOCK: tl.constexpr):
    """One row of N channels, each of which is ``share`` of it."""
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    b_x = tl.load(x + i_m * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_w = tl.load(weight + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_root = tl.sqrt_rn(tl.sum(b_x * b_x, 0) * share + epsilon)
    tl.store(y + i_m * N + o_n, (b_x * tl.div_rn(1.0, b_root) * b_w).to(y.dtype.element_ty), mask=m_n)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """:func:`naive.rms_norm` of contiguous (…, N), rounded once."""
    y, columns = torch.empty_like(x), weight.numel()
    block = triton.next_power_of_2(columns)
    warps = min(max(block // (32 * _NUMBERS), 1), 16)
    _rms_norm_kernel[(x.numel() // columns,)](x, weight, y, epsilon, 1 / columns, columns, BLOCK=block, num_warps=warps)
    return y
