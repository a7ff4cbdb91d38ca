"""What a gate does, plainly."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``, rounded behind either."""
    return functional.silu(gate) * up
