"""The blocks that are live together, and what is done with them."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aq_lightning.calibration.attach import AttachedBlock, BlockFunction, attach, gained_biases, install, merge
from aq_lightning.calibration.observe import Ranges, initialize
from aq_lightning.calibration.streams import Arguments, run, to_device
from aq_lightning.models.loading import Pretrained
from aq_lightning.models.sites import Architecture, Heads
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import MinMax
from aq_lightning.recipe import Recipe

Weights = Mapping[str, QTensor | Tensor]


class LiveWindow:
    """Consecutive blocks of a model on the device, in float32, frozen.

    Args:
        pretrained: the model.
        indices: the blocks' indices.
        arguments: other arguments of every block of the model.
        recipe: the method.
        device: where to work.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        indices: range,
        arguments: Sequence[Arguments],
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.pretrained = pretrained
        self.recipe = recipe
        self.indices = indices
        self.device = device
        self.blocks = [pretrained.blocks[index].to(device, torch.float32) for index in indices]
        self.arguments = [to_device(arguments[index], device) for index in indices]

    def run(self, stream: Tensor) -> Tensor:
        """The blocks' answer to a stream, (samples, length, hidden) → a new one."""
        return self._run(self.blocks, stream)

    def attach(self, activations: Sequence[Ranges]) -> list[AttachedBlock]:
        """The recipe on each block, its transforms started from the activations observed."""
        attached = [self._attach(block, self.recipe.transforms, self.recipe.weight_quantizer) for block in self.blocks]
        for block, ranges in zip(attached, activations, strict=True):
            initialize(block, ranges)
        return attached

    def nearest_loss(self, inputs: Tensor, target: Tensor) -> float:
        """Objective of the window's blocks rounded to nearest, without transforms."""
        nearest = [self._attach(block, {}, MinMax).snapshot() for block in self.blocks]
        return self.loss(nearest, inputs, target)

    def loss(self, blocks: Sequence[BlockFunction], inputs: Tensor, target: Tensor) -> float:
        """Mean objective over all samples of this window's blocks, or of what stands for them."""
        output = self._run(blocks, inputs)
        parts = [self.recipe.objective.loss(y[None], t[None]) for y, t in zip(output, target, strict=True)]
        return float(torch.stack(parts).mean())

    def merge(self, attached: Sequence[AttachedBlock]) -> dict[str, QTensor | Tensor]:
        """Rounds for good; the model's tensors by their full names."""
        return {
            f"{self.pretrained.architecture.blocks}.{index}.{name}": tensor
            for index, block in zip(self.indices, attached, strict=True)
            for name, tensor in merge(block, self.pretrained.storage).items()
        }

    def install(self, weights: Weights) -> None:
        """Gives the blocks the tensors of a finished window, by their full names."""
        for index, block in zip(self.indices, self.blocks, strict=True):
            prefix = f"{self.pretrained.architecture.blocks}.{index}."
            mine = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
            install(block, mine)

    def release(self) -> None:
        """Frees the blocks' memory, and the streams that a Trainer's loops hold in reference cycles."""
        for block in self.blocks:
            block.to("meta")
        gc.collect()

    def _run(self, blocks: Sequence[BlockFunction], stream: Tensor) -> Tensor:
        return run(blocks, self.arguments, stream, self.recipe.batch_size, self.device)

    def _attach(self, block: nn.Module, transforms: Mapping, weight_quantizer: object) -> AttachedBlock:
        model = self.pretrained
        scheme = self.recipe.scheme
        return attach(block, model.architecture, model.heads, transforms, weight_quantizer, scheme, model.storage)


def switches(block: nn.Module, architecture: Architecture, heads: Heads, recipe: Recipe) -> list[str]:
    """Config switches that must be on for the recipe's result: those of the linears that gain a bias.

    Works on the meta device, and so checks before any weight is read that the recipe fits the architecture.

    Raises:
        RequestError: see :func:`aq_lightning.calibration.attach.attach`.
    """
    attached = attach(
        block, architecture, heads, recipe.transforms, recipe.weight_quantizer, recipe.scheme, torch.float32
    )
    gained = gained_biases(attached)
    return [switch for switch, together in architecture.bias_switches.items() if gained & set(together)]
