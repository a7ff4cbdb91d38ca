"""The kernel: one program inverts one matrix, which stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _eliminate_kernel(matrix, found, size, N: tl.constexpr):
    i = tl.arange(0, N)[:, None]
    j = tl.arange(0, N)[None, :]
    o = tl.program_id(0).to(tl.int64) * size * size + i * size + j
    m = (i < size) & (j < size)
    b_a = tl.load(matrix + o, mask=m, other=0.0)
    b_a = tl.where(m, b_a, tl.where(i == j, 1.0, 0.0).to(b_a.dtype))
    for k in range(size):
        b_row = tl.sum(tl.where(i == k, b_a, 0.0), axis=0)[None, :]
        b_column = tl.sum(tl.where((j == k) & (i != k), b_a, 0.0), axis=1)[:, None]
        b_pivot = 1.0 / tl.sum(tl.where((i == k) & (j == k), b_a, 0.0))
        b_row = tl.where(j == k, b_pivot, b_row * b_pivot)
        b_a = tl.where(i == k, b_row, tl.where(j == k, 0.0, b_a) - b_column * b_row)
    tl.store(found + o, b_a, mask=m)


def eliminate(matrix: Tensor) -> Tensor:
    """(…, size, size) → the same."""
    size = matrix.shape[-1]
    found = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    width = max(16, triton.next_power_of_2(size))
    programs = matrix.numel() // size**2
    _eliminate_kernel[(programs,)](matrix.contiguous(), found, size, N=width, num_warps=max(1, width**2 // 1024))
    return found
