"""What a quantized weight really costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aq_lightning.qtensor import QTensor
from aq_lightning.transforms.online import carrier


def effective_bits(merged: Mapping[str, QTensor | Tensor]) -> float:
    """Bits per weight of the quantized linears: codes, scales, zero points, the biases of those linears and all online
    products.

    Biases count whole, although a model may have had them before: the figure is never flattering.
    """
    weights = {name: tensor for name, tensor in merged.items() if isinstance(tensor, QTensor)}
    if not weights:
        return float("nan")
    bits = sum(tensor.stored_bits for tensor in weights.values())
    others = [merged.get(name.removesuffix("weight") + "bias") for name in weights]
    others += [merged[name] for name in merged if carrier(name)]
    bits += sum(tensor.numel() * torch.finfo(tensor.dtype).bits for tensor in others if tensor is not None)
    return bits / sum(tensor.codes.numel() for tensor in weights.values())
