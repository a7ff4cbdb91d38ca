"""Attention of one new token to all before it: one operator, which torch.compile and CUDA graphs keep."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.decode_attention import naive

LARGEST = 256
"""Numbers of a head that a program holds."""
_DTYPES = (torch.float16, torch.bfloat16)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(s q kᵀ + m) v`` of one token a sequence.

    On a GPU by a kernel whose programs share what there is to read, and that reads nothing of what the mask hides;
    elsewhere by :func:`naive.decode_attention`. The same numbers at every call. It has no gradient.

    Args:
        query: (batch, heads, 1, size).
        key, value: (batch, key-value heads, length, size); heads that follow each other share one.
        mask: (batch or 1, 1, 1, length), true where a token is seen, or what is added to its score; None: all are seen.
        scale: of scores.

    Returns:
        (batch, 1, heads, size), as transformers' attention functions answer.
    """
    return _decode_attention(query, key, value, mask, scale)


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether operands are what the kernel takes: on a GPU, without a gradient, and as :func:`fits` says."""
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.device.type == "cuda" and not differentiated and fits(query, key, value, mask)


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether these are one token a sequence, in half precision, with heads of one size and a mask for all of them."""
    return (
        query.shape[2] == 1
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and key.numel() > 0
        and query.shape[-1] == key.shape[-1] <= LARGEST
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and _hides(mask, query, key)
    )


def _hides(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    if mask is None:
        return True
    shapes = [(rows, 1, 1, key.shape[2]) for rows in (1, len(query))]
    return tuple(mask.shape) in shapes and mask.dtype in (torch.bool, query.dtype)


@torch.library.custom_op("aq_lightning::decode_attention", mutates_args=())
def _decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if query.device.type != "cuda":
        return naive.decode_attention(query, key, value, mask, scale)
    from aq_lightning.kernels.decode_attention import triton

    with torch.cuda.device_of(query):
        return triton.decode_attention(query, key, value, mask, scale)


@_decode_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, *query.shape[1::2])
