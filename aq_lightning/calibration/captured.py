"""Optimizer steps without the host in their way: forward and backward as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aq_lightning.calibration.batches import Batch
from aq_lightning.calibration.microbatch import MicroBatched

_WARM_UP = 3  # runs before recording, in which libraries allocate what they keep


class Graph:
    """Work on the device that is recorded once and then replayed; it must read and write the same tensors every time.

    Args:
        work: enqueues the work and returns tensors, the same on every replay.
        warm_up: times it runs before it is recorded.
        beside: whose memory it uses for what is needed during a replay alone, since neither runs while the other does;
            None: its own.
    """

    def __init__(self, work: Callable[[], Tensor | None], warm_up: int, beside: Graph | None = None) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before, pool = generator.clone_state(), None if beside is None else beside._graph.pool()
        try:
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self.result = work()
        except RuntimeError:
            generator.graphsafe_set_state(before)  # which otherwise believes for ever that it is being recorded
            raise

    def replay(self) -> Tensor | None:
        """Does the work again; what ``work`` returned when it was recorded."""
        self._graph.replay()
        return self.result


class Captured(MicroBatched):
    """A module that records its step on a GPU and replays it for every full batch.

    Recording happens at the first full batch of a fit, or of what is left of it: a replay may differ from a plain step
    in the last bit, so which steps are replays must not depend on where a fit goes on. Gradients are written by each
    replay, not added up, and so are never cleared. Batches of another size, and those that are cut for want of memory,
    run as they would without.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step: Graph | None = None
        self._batch: tuple[Tensor, Tensor] = ()  # what the recorded step reads
        self._total = 0  # samples of all processes in it
        self._after: Graph | None = None
        self._replayed = self._refused = False

    def recordable(self, samples: int) -> bool:
        """Whether steps of that many samples, of all processes, may be recorded."""
        raise NotImplementedError

    def steady(self) -> bool:
        """Whether batches are steps, and each does what the one before did."""
        scaled = self.trainer.precision == "16-mixed"  # losses are, by a factor that changes
        return self.trainer.accumulate_grad_batches == 1 and not scaled

    def wanted(self, choice: bool | None) -> bool:
        """What a recipe says, or where it says nothing, whether this is a GPU."""
        return self.device.type == "cuda" if choice is None else choice

    def changing(self) -> list[Tensor]:
        """Buffers that a step changes before its update."""
        raise NotImplementedError

    follows = True
    """Whether anything does: nothing cannot be recorded."""

    def after_update(self) -> None:
        """What follows each optimizer step, on the device alone; recorded too."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drops what was recorded: the next step records anew."""
        self._step = self._after = None
        self._batch = ()
        self.zero_grad()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._replayed, self._samples, self._here = False, batch.total, len(batch.inputs)
        if self._step is not None and self.micro_batch:
            self.forget()
        if self._step is None and not self._refused and not self.micro_batch and self.recordable(batch.total):
            self._record(batch)
        if self._step is None or batch.total != self._total or batch.inputs.shape != self._batch[0].shape:
            return super().training_step(batch, batch_idx)
        for kept, given in zip(self._batch, batch[:2], strict=True):
            kept.copy_(given)
        self._replayed = True
        self._step_loss = self._step.replay()
        self.log("loss", self.loss, on_step=False, on_epoch=True, logger=False)
        return self._step_loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self._replayed and self.follows:
            self._after = self._after or Graph(self.after_update, warm_up=0)
            self._after.replay()
        elif self.follows:
            self.after_update()

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self.forget()  # and with it the memory of its intermediate results

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self._replayed:  # a replay has done it
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self._step is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        elif not self._replayed:
            optimizer.zero_grad(set_to_none=False)  # the graph goes on writing to these tensors

    def _record(self, batch: Batch) -> None:
        self._batch = batch.inputs.clone(), batch.targets.clone()
        self._total = batch.total
        torch.clear_autocast_cache()  # of weights as they are before this step, which replays must not go on with

        def work() -> Tensor:
            self.zero_grad()  # so that the backward pass writes, instead of adding to what was there
            self._step_loss = torch.zeros((), device=batch.inputs.device)
            self._share(*self._batch).backward()
            if self.alone:
                self.before_update(self._step_loss)
            return self._step_loss

        buffers = self.changing()
        before = [buffer.clone() for buffer in buffers]
        try:
            self._step = Graph(work, _WARM_UP)
            for buffer, known in zip(buffers, before, strict=True):
                buffer.copy_(known)  # the warm-up leaves no trace: a resumed fit records anew
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refused = True
            self.forget()
            warnings.warn(f"{self.place}: steps cannot be recorded ({error}); going on without.", stacklevel=2)
