"""``w x / √(mean(x²) + ε)``, which stands before attention and MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.rms_norm import naive

LARGEST = 16384
"""Channels that a program holds."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``w x / √(mean(x²) + ε)`` over channels.

    One kernel on a GPU, in float32 and rounded once. A compiler joins norms with what precedes them, and is left to it;
    elsewhere, and where a gradient is wanted, the plain form runs.

    Args:
        x: (…, channels), of any float dtype, without gaps.
        weight: (channels).
        epsilon: added to the mean square.
    """
    if not _one_kernel(x, weight):
        return naive.rms_norm(x, weight, epsilon)
    from aq_lightning.kernels.rms_norm import triton

    with torch.cuda.device_of(x):
        return triton.rms_norm(x, weight, epsilon)


def _one_kernel(x: Tensor, weight: Tensor) -> bool:
    differentiated = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    there = x.device.type == "cuda" and not torch.compiler.is_compiling()
    return there and not differentiated and _served(x, weight)


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel reads such tensors; what it does not, the plain form computes or refuses."""
    alike = weight.shape == x.shape[-1:] and weight.device == x.device
    return alike and 0 < x.numel() and weight.numel() <= LARGEST and x.is_contiguous() and weight.is_contiguous()
