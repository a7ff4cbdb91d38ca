"""A gate in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns of a program


@triton.jit
def _gated_silu_kernel(gate, up, y, gate_stride, up_stride, N, BLOCK: tl.constexpr):
    """BLOCK columns of one row."""
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_gate = tl.load(gate + i_m * gate_stride + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_m * up_stride + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_y = tl.div_rn(b_gate, 1.0 + tl.exp(-b_gate)) * b_up
    tl.store(y + i_m * N + o_n, b_y.to(y.dtype.element_ty), mask=m_n)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` of (M, N), rounded once; rows may lie apart, columns do not."""
    rows, columns = gate.shape
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grid = rows, triton.cdiv(columns, _BLOCK)
    _gated_silu_kernel[grid](gate, up, y, gate.stride(0), up.stride(0), columns, BLOCK=_BLOCK)
    return y
