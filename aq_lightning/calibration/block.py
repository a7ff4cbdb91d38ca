"""One window of blocks as a LightningModule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.random_state import random_state, restore_random_state
from aq_lightning.calibration.streams import Arguments
from aq_lightning.durable import save_tensors
from aq_lightning.errors import RequestError
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
        self.loss.persistent(True)  # in checkpoints inside an epoch
        self.strict_loading = False  # which leave the frozen blocks out
        self.after_step: Callable[[BlockCalibration, int], None] | None = None
        self.micro_batch: int | None = None
        self._step_loss: Tensor | None = None
        self._stopped = False
        self._random: dict[str, Any] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, hidden) through all blocks of the window."""
        compiled = self.device.type == "cuda" if self.recipe.compiled is None else self.recipe.compiled
        answer = _compiled() if compiled else _answer
        for block, others in zip(self.blocks, self.arguments, strict=True):
            hidden = answer(block, hidden, others)
        return hidden

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch; of micro-batches, all but the last already have their gradients added."""
        hidden, target = batch  # each (batch, length, hidden)
        size = self.micro_batch or len(hidden)
        if self.micro_batch:
            self.zero_grad()  # not between the parts
        *parts, last = zip(hidden.split(size), target.split(size), strict=True)
        self._step_loss = torch.zeros((), device=hidden.device)
        for part in parts:
            self.trainer.strategy.backward(self._share(*part, len(hidden)), None)
        loss = self._share(*last, len(hidden))
        self.log("loss", self.loss, on_step=False, on_epoch=True, logger=False)
        return loss

    def _share(self, hidden: Tensor, target: Tensor, batch: int) -> Tensor:
        """What a part of a batch adds to its mean loss."""
        dtype = next(self.blocks[0].block.parameters()).dtype
        loss = self.recipe.objective.loss(self(hidden.to(dtype)), target)
        loss = loss if len(hidden) == batch else loss * (len(hidden) / batch)
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if not self.micro_batch:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """A step whose forward and backward pass are tried with ever smaller micro-batches until the memory is enough;
        the batch, and so the mean loss, stays the same."""

        def closure() -> Any:
            while True:
                with suppress(torch.OutOfMemoryError):
                    return optimizer_closure()
                self._halve()

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _halve(self) -> None:
        size = self.micro_batch or self.recipe.batch_size
        if size == 1 or self.trainer.accumulate_grad_batches > 1:
            raise RequestError(
                f"A window of text at a time must fit into the GPU's memory, got too little in block "
                f"{self.position.index}: lower data.length, set --model.streams.place host"
                f"{', or leave --trainer.accumulate_grad_batches at 1' if size > 1 else ''}."
            )
        self.micro_batch = (size + 1) // 2
        self.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"block {self.position.index}: out of memory with {size} windows of text at once; going on with "
            f"{self.micro_batch}, {self.recipe.batch_size} to a step as before.",
            stacklevel=2,
        )

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        for matrix in self.matrices():
            matrix.project()
        self.loss.update(self._step_loss)
        if self.after_step is not None:
            self.after_step(self, batch_idx)

    def on_train_start(self) -> None:
        if self._random is not None:
            restore_random_state(self._random)
        self.trainer.should_stop = self._stopped

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {name: tensor for name, tensor in checkpoint["state_dict"].items() if ".block." not in name}
        own = {"first_epoch": self.first_epoch, "micro_batch": self.micro_batch, "stopped": self.trainer.should_stop}
        checkpoint |= {"state_dict": kept, "window": own, "random": random_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, self._random = checkpoint["window"], checkpoint["random"]
        self.first_epoch, self.micro_batch, self._stopped = own["first_epoch"], own["micro_batch"], own["stopped"]

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
    """One compiled function for the process: blocks of one shape share its code.

    Every shape gets its own: code that serves several would depend on which came first, and its sums with it.
    """
    return torch.compile(_answer, dynamic=False)


def save_trained(module: BlockCalibration, directory: Path) -> None:
    """Writes ``transforms.safetensors``: what a window learnt, in float64."""
    save_tensors(directory / "transforms.safetensors", module.trained())
