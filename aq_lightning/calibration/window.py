"""The blocks that are live together, and what is done with them."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aq_lightning.calibration.attach import AttachedBlock, BlockFunction, attach, gained_biases, install, merge
from aq_lightning.calibration.observe import Ranges, initialize
from aq_lightning.calibration.streams import Arguments, check_finite, run, to_device
from aq_lightning.models.loading import Pretrained
from aq_lightning.models.naming import from_checkpoint, to_checkpoint
from aq_lightning.models.sites import Architecture, Heads
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import MinMax
from aq_lightning.recipe import Recipe

Weights = Mapping[str, QTensor | Tensor]


class LiveWindow:
    """Consecutive blocks of a model on the device, in float32, frozen.

    Args:
        pretrained: the model.
        blocks: the blocks by index, with their weights; they are used up.
        arguments: other arguments of every block of the model.
        recipe: the method.
        device: where to work.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        blocks: Mapping[int, nn.Module],
        arguments: Sequence[Arguments],
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.pretrained = pretrained
        self.recipe = recipe
        self.indices = list(blocks)
        self.device = device
        self.blocks = [block.to(device, torch.float32) for block in blocks.values()]
        self.arguments = [to_device(arguments[index], device) for index in blocks]
        architecture = pretrained.architecture
        on = switches(self.blocks[0], architecture, pretrained.heads, recipe)
        self._biased = [linear for switch in on for linear in architecture.bias_switches[switch]]

    def run(self, stream: Tensor) -> Tensor:
        """The blocks' answer to a stream, (samples, length, hidden) → a new one."""
        return check_finite(self._run(self.blocks, stream))

    def attach(self, activations: Sequence[Ranges]) -> list[AttachedBlock]:
        """The recipe on each block, its transforms started from the activations observed."""
        attached = [self._attach(block, self.recipe.transforms, self.recipe.weight_quantizer) for block in self.blocks]
        for block, ranges in zip(attached, activations, strict=True):
            initialize(block, ranges)
        return attached

    def attach_nearest(self) -> list[AttachedBlock]:
        """Round-to-nearest on each block, without transforms."""
        return [self._attach(block, {}, MinMax) for block in self.blocks]

    def loss(self, blocks: Sequence[nn.Module], inputs: Tensor, target: Tensor) -> float:
        """Mean objective over all samples of this window's blocks, attached or plain; infinite if any is not finite."""
        functions = [block.snapshot() if isinstance(block, AttachedBlock) else block for block in blocks]
        output = self._run(functions, inputs)
        parts = [self.recipe.objective.loss(y[None], t[None]) for y, t in zip(output, target, strict=True)]
        mean = float(torch.stack(parts).mean())
        return mean if math.isfinite(mean) else math.inf

    def merge(self, attached: Sequence[AttachedBlock]) -> dict[str, QTensor | Tensor]:
        """Rounds for good; the model's tensors by their full names in checkpoints."""
        architecture = self.pretrained.architecture
        return {
            f"{architecture.blocks}.{index}.{name}": tensor
            for index, block in zip(self.indices, attached, strict=True)
            for name, tensor in to_checkpoint(
                merge(block, self.pretrained.storage, self._biased), architecture, block.block
            ).items()
        }

    def install(self, weights: Weights) -> None:
        """Gives the blocks the tensors of a finished window, by their full names in checkpoints."""
        for index, block in zip(self.indices, self.blocks, strict=True):
            prefix = f"{self.pretrained.architecture.blocks}.{index}."
            mine = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
            install(block, from_checkpoint(mine, self.pretrained.architecture))

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

    Works on the meta device.

    Raises:
        RequestError: see :func:`aq_lightning.calibration.attach.attach`.
    """
    attached = attach(
        block, architecture, heads, recipe.transforms, recipe.weight_quantizer, recipe.scheme, torch.float32
    )
    attached.detach()
    gained = gained_biases(attached)
    return [switch for switch, together in architecture.bias_switches.items() if gained & set(together)]
