"""``silu(gate) · up``, which a gated MLP reads from two halves of one product."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.gated_silu import naive


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``.

    One kernel on a GPU, in float32 and rounded once, where PyTorch takes two and writes what is between them. A
    compiler makes one by itself, and is left to it; elsewhere, and where a gradient is wanted, the plain form runs.

    Args:
        gate: (…, N), of any float dtype; rows may lie apart.
        up: the same shape and dtype.
    """
    if not _one_kernel(gate, up):
        return naive.gated_silu(gate, up)
    from aq_lightning.kernels.gated_silu import triton

    with torch.cuda.device_of(gate):
        return triton.gated_silu(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)


def _one_kernel(gate: Tensor, up: Tensor) -> bool:
    differentiated = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    there = gate.device.type == "cuda" and not torch.compiler.is_compiling()
    return there and not differentiated and gate.numel() > 0 and gate.stride(-1) == up.stride(-1) == 1
