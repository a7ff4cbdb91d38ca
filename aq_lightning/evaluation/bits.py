"""What a quantized weight really costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

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


def stored_bits(tensors: Mapping[str, Tensor], linears: Mapping[str, nn.Linear]) -> float:
    """Bits per weight of linears in a format that is not known here: all that lies in the files under their names.

    Args:
        tensors: of the checkpoint, read one at a time.
        linears: the quantized ones by path; they may be on the meta device.

    Returns:
        NaN if nothing lies under the name of some linear.
    """
    stored = dict.fromkeys(linears, 0)
    for name in tensors:
        path = name.rpartition(".")[0]
        if path in stored:
            tensor = tensors[name]
            stored[path] += 8 * tensor.numel() * tensor.element_size()
    if not stored or not all(stored.values()):
        return float("nan")
    return sum(stored.values()) / sum(linear.in_features * linear.out_features for linear in linears.values())
