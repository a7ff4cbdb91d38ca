"""Optimizer steps that do with the memory there is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from aq_lightning import distributed
from aq_lightning.calibration.batches import Batch
from aq_lightning.errors import RequestError


class MicroBatched(LightningModule):
    """A module whose batches lie on several processes, and are cut in halves when the memory does not hold them.

    The gradients of the parts add up to that of the batch's mean, so a step stays what it was up to the order of sums:
    those of one process behind each other, those of all processes once behind the backward pass. A subclass defines
    :meth:`objective` and :attr:`place`.
    """

    place: str
    """What the module is called in messages."""

    def __init__(self) -> None:
        super().__init__()
        self.micro_batch: int | None = None  # samples at once; None: all of a batch
        self.loss = MeanMetric(nan_strategy="disable", sync_on_compute=False)  # a NaN must show; the same everywhere
        self.loss.persistent(True)  # in checkpoints inside an epoch
        self._samples = self._here = 0  # in the batch of this step: of all processes, and of this one
        self._step_loss = torch.zeros(())

    def objective(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean loss of some samples."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden, target, self._samples = batch
        self._here = len(hidden)
        size = self.micro_batch or max(len(hidden), 1)
        if self.micro_batch:
            self.zero_grad()  # here, for Lightning would do it between the parts
        *parts, last = zip(hidden.split(size), target.split(size), strict=True)
        self._step_loss = torch.zeros((), device=hidden.device)
        for part in parts:
            self.trainer.strategy.backward(self._share(*part), None)
        loss = self._share(*last) if len(hidden) else self._step_loss  # other processes have the last samples
        if self.alone:
            self.before_update(self._step_loss)
        self.log("loss", self.loss, on_step=False, on_epoch=True, logger=False)
        return loss

    def before_update(self, loss: Tensor) -> None:
        """What precedes each optimizer step, on the device alone; ``loss`` is the batch's, a scalar."""
        raise NotImplementedError

    @property
    def alone(self) -> bool:
        """Whether this process has all samples."""
        return distributed.ranks() == 1

    @torch.no_grad()
    def _add_up(self) -> None:
        """Gradients and loss of the whole batch, in the tensors that hold those of this process's part."""
        trained = [each for each in self.parameters() if each.requires_grad]
        for each in (each for each in trained if each.grad is None):
            each.grad = torch.zeros_like(each)
        distributed.add_up([*(each.grad for each in trained), self._step_loss])
        self.before_update(self._step_loss)

    def _share(self, hidden: Tensor, target: Tensor) -> Tensor:
        """What a part adds to the mean loss of its batch."""
        loss = self.objective(hidden, target)
        loss = loss if len(hidden) == self._samples else loss * (len(hidden) / self._samples)
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def on_train_end(self) -> None:
        for optimizer in self.trainer.optimizers:  # nobody steps again, and Lightning would move it all to the host
            optimizer.state.clear()

    def on_fit_end(self) -> None:
        for callback in self.trainer.callbacks:  # which outlive this module: Lightning leaves its methods in them
            for name in ("log", "log_dict"):
                vars(callback).pop(name, None)

    def cpu(self) -> MicroBatched:
        """Stays where it is: Lightning moves modules to the host behind every fit, frozen blocks and all."""
        return self

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:  # not that of no samples
            super().backward(loss, *args, **kwargs)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.loss.update(self._step_loss)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if not self.micro_batch:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        def closure() -> Any:
            while True:
                with suppress(torch.OutOfMemoryError):
                    result = optimizer_closure()
                    break
                self._halve()
            if not self.alone:
                self._add_up()
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _halve(self) -> None:
        size = min(self.micro_batch or self._here, self._here)
        if size == 1 or self.trainer.accumulate_grad_batches > 1:
            raise RequestError(
                f"A window of text at a time must fit into the GPU's memory, got too little for {self.place}: lower "
                "data.length, set --model.streams.place host"
                f"{', or leave --trainer.accumulate_grad_batches at 1' if size > 1 else ''}."
            )
        self.micro_batch = (size + 1) // 2
        self.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"{self.place}: out of memory with {size} windows of text at once; going on with {self.micro_batch}, the "
            f"same {self._samples} to a step.",
            stacklevel=2,
        )
