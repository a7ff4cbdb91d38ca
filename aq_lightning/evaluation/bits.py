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
    bits, codes = 0, 0
    for name, tensor in merged.items():  # one at a time: a checkpoint reads them when asked
        if isinstance(tensor, QTensor):
            bits += tensor.stored_bits
            codes += tensor.codes.numel()
            beside = merged.get(name.removesuffix("weight") + "bias")
        else:
            beside = tensor if carrier(name) else None
        if beside is not None:
            bits += beside.numel() * torch.finfo(beside.dtype).bits
    return bits / codes if codes else float("nan")
