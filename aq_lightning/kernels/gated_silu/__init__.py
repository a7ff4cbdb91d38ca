"""``silu(gate) · up``, which a gated MLP reads from two halves of one product."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.gated_silu import naive


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` in float32, rounded once; it has no gradient.

    One kernel on a GPU, where PyTorch takes two and writes what is between them. A compiler makes one by itself, and is
    left to it; elsewhere the plain form runs, which rounds twice.

    Args:
        gate: (…, N), of any float dtype; rows may lie apart.
        up: the same shape and dtype.
    """
    if gate.device.type != "cuda" or torch.compiler.is_compiling() or not gate.numel():
        return naive.gated_silu(gate, up)
    from aq_lightning.kernels.gated_silu import triton

    return triton.gated_silu(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)
