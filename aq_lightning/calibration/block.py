"""One window of blocks as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchmetrics import MeanMetric

from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.streams import Arguments
from aq_lightning.durable import save_tensors
from aq_lightning.recipe import Recipe
from aq_lightning.transforms import Affine


@dataclass(frozen=True)
class Position:
    """Where a window stands in the run, for displays and logs."""

    index: int
    """Index of the window's first block."""
    window: int
    """Index of the window."""
    windows: int
    """Number of windows in the model."""


class BlockCalibration(LightningModule):
    """Fits the transforms and clipping of a window of blocks to its target; the blocks themselves are frozen.

    Args:
        blocks: attached blocks in order.
        arguments: other arguments of each block, on the training device.
        recipe: objective, optimizer and step sizes.
        position: where the window stands in the run.
        slowdown: factor on every step size, for another attempt after one that diverged.
    """

    def __init__(
        self,
        blocks: Sequence[AttachedBlock],
        arguments: Sequence[Arguments],
        recipe: Recipe,
        position: Position,
        slowdown: float = 1.0,
    ) -> None:
        super().__init__()
        self.slowdown = slowdown
        self.first_epoch: dict[str, Tensor] = {}
        self.blocks = nn.ModuleList(blocks)
        self.arguments = arguments
        self.recipe = recipe
        self.position = position
        self.loss = MeanMetric(nan_strategy="disable")  # a NaN must show

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, hidden) through all blocks of the window."""
        compiled = self.device.type == "cuda" if self.recipe.compiled is None else self.recipe.compiled
        answer = _compiled() if compiled else _answer
        for block, others in zip(self.blocks, self.arguments, strict=True):
            hidden = answer(block, hidden, others)
        return hidden

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden, target = batch  # each (batch, length, hidden)
        dtype = next(self.blocks[0].block.parameters()).dtype
        loss = self.recipe.objective.loss(self(hidden.to(dtype)), target)
        self.loss.update(loss.detach())
        self.log("loss", self.loss, on_step=False, on_epoch=True, logger=False)
        return loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        for matrix in self.matrices():
            matrix.project()

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 0:  # only the diagonals of affine matrices are open yet
            self.first_epoch = {name: tensor.clone() for name, tensor in self.own().items()}
        if not torch.isfinite(self.loss.compute()):
            self.trainer.should_stop = True  # nothing finite comes back from here: the next attempt is slower

    def matrices(self) -> list[Affine]:
        """Every affine matrix of the window."""
        return [part for block in self.blocks for part in block.transforms.modules() if isinstance(part, Affine)]

    def configure_optimizers(self) -> object:
        rates = self.recipe.learning_rates
        groups = [
            {"params": list(part.parameters()), "lr": rate * self.slowdown}
            for block in self.blocks
            for part, rate in ((block.transforms, rates.transform), (block.quantizers, rates.clipping))
        ]
        optimizer = self.recipe.optimizer([group for group in groups if group["params"]])
        if not self.recipe.cosine:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trainable(self) -> bool:
        """Whether the recipe leaves anything to train."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def conditions(self) -> dict[str, float]:
        """Condition number of each site's transform, the worst over the window's blocks."""
        sites = {name for block in self.blocks for name in block.transforms}
        return {
            site: max(float(block.transforms[site].condition()) for block in self.blocks if site in block.transforms)
            for site in sorted(sites)
        }

    def trained(self) -> dict[str, Tensor]:
        """Every trainable parameter by name, the masks of affine matrices included, in float64 on the host."""
        return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in self.own().items()}

    def return_to_first_epoch(self) -> None:
        """Undoes everything after the first epoch."""
        self.blocks.load_state_dict(self.first_epoch, strict=False)

    def own(self) -> dict[str, Tensor]:
        """Parameters and masks of transforms and quantizers, by name."""
        return {name: tensor for name, tensor in self.blocks.state_dict().items() if ".block." not in name}


def _answer(block: AttachedBlock, hidden: Tensor, others: Arguments) -> Tensor:
    return block(hidden, **others)


@cache
def _compiled() -> Callable[[AttachedBlock, Tensor, Arguments], Tensor]:
    """One compiled function for the process: blocks of one shape share its code."""
    return torch.compile(_answer)


def save_trained(module: BlockCalibration, directory: Path) -> None:
    """Writes ``transforms.safetensors``: what a window learnt, in float64."""
    save_tensors(directory / "transforms.safetensors", module.trained())


class Pairs(Dataset):
    """Inputs and targets of a window; a whole batch is taken by one indexing."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices, device=self.inputs.device)
        return self.inputs[index], self.targets[index]


def pairs(inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> DataLoader:
    """Shuffled batches (inputs, targets), each (batch, length, hidden); the same seed gives the same order."""
    data = Pairs(inputs, targets)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, batch_size, sampler=sampler, collate_fn=lambda batch: batch)
