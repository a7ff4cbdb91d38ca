"""What a norm by the root mean square does, plainly."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``w x / √(mean(x²) + ε)`` over the last dimension."""
    return functional.rms_norm(x, weight.shape, weight, epsilon)
