"""Linears that read the same tensor, multiplied as one: q, k, v and gate, up; and online products ahead of them.

A block calls its linears one after another, each with the same tensor. The first call computes the outputs of all; the
others take theirs. So the block itself stays as transformers wrote it. A Kronecker product moves from the norm whose
output it multiplies to the one linear that reads it, which multiplies and rounds in one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aq_lightning.deploy.attending import attend_fast
from aq_lightning.deploy.elementwise import join_elementwise
from aq_lightning.deploy.linear import Int4Linear
from aq_lightning.models.lookup import architecture_of, model_types
from aq_lightning.models.sites import Site
from aq_lightning.qtensor import QTensor
from aq_lightning.transforms.online import carried, drop, of


class Joint(nn.Module):
    """Several layers of the same input as one, which remembers its answer until the last has taken its part."""

    def __init__(self, linears: list[Int4Linear]) -> None:
        super().__init__()
        self.linear = joined(linears)
        self.widths = [linear.out_features for linear in linears]
        self._answer: list[Any] = []  # what was read, and the outputs; a module's own attributes take longer to set

    def take(self, index: int, x: Tensor) -> Tensor:
        """Output of the layer number ``index``, (…, its width), for x (…, K)."""
        answer = self._answer
        if not answer or answer[0] is not x:
            answer[:] = x, self.linear(x).split(self.widths, -1)
        part = answer[1][index]
        if index == len(self.widths) - 1:
            answer.clear()
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

    @property
    def layer(self) -> Int4Linear:
        """What multiplies for it."""
        return self._joint[0].linear

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
    """Joins, in place, the packed linears of every block that read the same norm, as the architecture says, and gives
    them the Kronecker product of their input; norms, gates and rotary embeddings take one pass over memory
    (:mod:`elementwise`), and one new token attends by a kernel (:mod:`attending`).

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
            _hand_over(block, site)
        for linear in [module for module in block.modules() if isinstance(module, Int4Linear)]:
            _absorb(linear, linear)
    return attend_fast(join_elementwise(model))


def _hand_over(block: nn.Module, site: Site) -> None:
    """Moves a product from the norm of a site to the layer that reads it, if one does and nothing else."""
    producer = block.get_submodule(site.producer.partition(":")[0])
    readers = {_layer(block.get_submodule(path)) for path in site.consumers}
    if len(readers) == 1 and not isinstance(producer, nn.Linear):  # a linear carries the products of its input
        _absorb(producer, readers.pop())


def _layer(module: nn.Module) -> nn.Module:
    """The layer that multiplies for a consumer."""
    return module.layer if isinstance(module, Part) else module


def _absorb(module: nn.Module, reader: nn.Module) -> None:
    """Gives what ``module`` carries to the layer that reads it, if both do it faster together."""
    online = of(module)
    if online is None or not isinstance(reader, Int4Linear) or of(reader) not in (None, online):
        return
    activation = reader.scheme.activation
    if activation is not None and activation.symmetric and online.kronecker() is not None:
        drop(module)
        reader.absorb(online)
