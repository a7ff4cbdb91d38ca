"""What a quantized weight really costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aq_lightning.qtensor import QTensor


def effective_bits(merged: Mapping[str, QTensor | Tensor]) -> float:
    """Bits per weight of the quantized linears: codes, scales, zero points and the biases of those linears.

    Biases count whole, although a model may have had them before: the figure is never flattering.
    """
    weights = {name: tensor for name, tensor in merged.items() if isinstance(tensor, QTensor)}
    if not weights:
        return float("nan")
    bits = sum(tensor.stored_bits for tensor in weights.values())
    biases = [merged.get(name.removesuffix("weight") + "bias") for name in weights]
    bits += sum(bias.numel() * torch.finfo(bias.dtype).bits for bias in biases if bias is not None)
    return bits / sum(tensor.codes.numel() for tensor in weights.values())
