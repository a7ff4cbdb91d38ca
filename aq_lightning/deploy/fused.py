"""Linears that read the same tensor, multiplied as one: q, k, v and gate, up.

A block calls its linears one after another, each with the same tensor. The first call computes the outputs of all; the
others take theirs. So the block itself stays as transformers wrote it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aq_lightning.deploy.linear import Int4Linear
from aq_lightning.models.lookup import architecture_of, model_types
from aq_lightning.qtensor import QTensor
from aq_lightning.transforms.online import carried


class Joint(nn.Module):
    """Several layers of the same input as one, which remembers its answer until the last has taken its part."""

    def __init__(self, linears: list[Int4Linear]) -> None:
        super().__init__()
        self.linear = joined(linears)
        self.widths = [linear.out_features for linear in linears]
        self._read: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def take(self, index: int, x: Tensor) -> Tensor:
        """Output of the layer number ``index``, (…, its width), for x (…, K)."""
        if self._read is not x:
            self._read, self._parts = x, self.linear(x).split(self.widths, -1)
        part = self._parts[index]
        if index == len(self.widths) - 1:
            self._read, self._parts = None, ()
        return part


class Part(nn.Module):
    """One layer of a :class:`Joint`, which the first of them holds."""

    def __init__(self, joint: Joint, index: int) -> None:
        super().__init__()
        self.index = index
        self.in_features, self.out_features = joint.linear.in_features, joint.widths[index]
        self._joint = (joint,)  # not a submodule of each
        if index == 0:
            self.joint = joint

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N) of this layer."""
        return self._joint[0].take(self.index, x)

    def unpack(self) -> tuple[QTensor, Tensor | None]:
        """Weight (N, K) and bias (N) of this layer."""
        joint = self._joint[0]
        start = sum(joint.widths[: self.index])
        rows = slice(start, start + self.out_features)
        weight, bias = joint.linear.unpack(), joint.linear.bias
        own = QTensor(weight.codes[rows], weight.scale[rows], weight.zero[rows], weight.grid)
        return own, None if bias is None else bias[rows]


def joined(linears: list[Int4Linear]) -> Int4Linear:
    """One layer with the outputs of several, in order; either all have a bias or none."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return Int4Linear.of(QTensor.joined([linear.unpack() for linear in linears]), linears[0].scheme, bias)


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Joins, in place, the packed linears of every block that read the same norm, as the architecture says.

    A model of an unknown architecture stays as it is, and so do linears of which some have a bias and some have none,
    or that multiply their input by an online product.
    """
    if model.config.model_type not in model_types():
        return model
    architecture = architecture_of(model.config)
    multiplying = {module for module, _ in carried(model)}
    for block in model.get_submodule(architecture.blocks):
        for site in architecture.sites:
            modules = {path: block.get_submodule(path) for path in site.consumers if path not in architecture.experts}
            linears = {path: module for path, module in modules.items() if isinstance(module, Int4Linear)}
            alike = len({linear.bias is None for linear in linears.values()}) == 1
            if len(linears) > 1 and alike and not multiplying.intersection(linears.values()):
                joint = Joint(list(linears.values()))
                for index, path in enumerate(linears):
                    block.set_submodule(path, Part(joint, index))
    return model
