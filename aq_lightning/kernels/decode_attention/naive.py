"""Attention of one token, plainly."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(s q kᵀ + m) v`` in float32, rounded once; arguments as :func:`..decode_attention`."""
    batch, heads, _, size = query.shape
    grouped = query.float().view(batch, key.shape[1], -1, size)  # (batch, key-value heads, query heads of each, size)
    scores = scale * grouped @ key.float().mT  # (batch, key-value heads, query heads of each, length)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    answer = scores.softmax(-1) @ value.float()
    return answer.view(batch, 1, heads, size).to(query.dtype)
