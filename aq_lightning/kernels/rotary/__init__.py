"""Rotary position embedding of queries and keys, which attention multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.rotary import naive


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x · cos + rotate_half(x) · sin`` of queries and keys, where ``rotate_half`` of two halves (a, b) is (-b, a).

    One kernel for both on a GPU, in float32 and rounded once, where PyTorch takes ten and writes what is between them.
    A compiler joins them by itself, and is left to it; elsewhere, and where a gradient is wanted, the plain form runs.

    Args:
        q: (batch, heads, tokens, size), of any float dtype, as views of a product leave them.
        k: (batch, key-value heads, tokens, size), of the same dtype.
        cos, sin: (batch or 1, tokens, size), of the same dtype, the same for all heads.

    Returns:
        Of the shapes of q and k, their dimensions in the same order in memory.
    """
    if not _one_kernel(q, k, cos, sin):
        return naive.rotary(q, k, cos, sin)
    from aq_lightning.kernels.rotary import triton

    with torch.cuda.device_of(q):
        return triton.rotary(q, k, cos, sin)


def _one_kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    tensors = q, k, cos, sin
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return _served(*tensors)


def _served(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel reads such tensors; what it does not, the plain form computes or refuses."""
    if not q.ndim == k.ndim == 4 or not cos.ndim == sin.ndim == 3 or 0 in (q.numel(), k.numel()):
        return False
    batch, _, tokens, size = q.shape
    shaped = k.shape[0] == batch and k.shape[2:] == q.shape[2:] and cos.shape == sin.shape
    shaped = shaped and cos.shape[0] in (1, batch) and cos.shape[1:] == (tokens, size) and size % 2 == 0
    alike = all(tensor.dtype == q.dtype and tensor.device == q.device for tensor in (k, cos, sin))
    return shaped and alike and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
