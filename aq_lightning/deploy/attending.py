"""Attention of packed models: one new token a sequence runs on a kernel of this package, all else as PyTorch does it.

PyTorch gives a head's whole cache to one program, reads what the mask hides, and where steps are compiled transformers
copies keys and values for every query head that shares them.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from aq_lightning.attention import attentions, replace_sdpa, sdpa
from aq_lightning.kernels.decode_attention import decode_attention, suits


def attend_fast(model: PreTrainedModel) -> PreTrainedModel:
    """Gives, in place, every attention module that multiplies by PyTorch's function :func:`attend` instead."""
    for module in attentions(model):
        replace_sdpa(module, attend)
    return model


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers' attention functions are asked for, and answer: (batch, tokens, heads, size)."""
    known = all(others.get(name) is None for name in ("position_bias", "cache", "softcap"))
    if dropout or not known or not suits(query, key, value, mask):
        return sdpa()(module, query, key, value, mask, dropout=dropout, scaling=scaling, **others)
    return decode_attention(query, key, value, mask, scaling or query.shape[-1] ** -0.5), None
