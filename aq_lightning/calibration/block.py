"""One window of blocks as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aq_lightning import distributed
from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.batches import Batch
from aq_lightning.calibration.best import Best, State
from aq_lightning.calibration.captured import Captured
from aq_lightning.calibration.compiled import answer_plainly, compiled_answer
from aq_lightning.calibration.optimization import OFFSET, optimization
from aq_lightning.calibration.products import products
from aq_lightning.calibration.random_state import random_state, restore_random_state
from aq_lightning.calibration.streams import Arguments
from aq_lightning.calibration.watch import Cause, Quantity, Watch
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


class BlockCalibration(Captured):
    """Fits the transforms and clipping of a window of blocks to its target; the blocks themselves are frozen.

    Args:
        blocks: attached blocks in order.
        arguments: other arguments of each block, on the training device.
        recipe: objective, optimizer and step sizes.
        position: where the window stands in the run.
        slowdown: factor on every step size, for another attempt after one that was stopped.
        opening: factor on the stability factor of every affine matrix; 0 keeps them diagonal.
        ceiling: an epoch whose mean loss is greater has diverged.
    """

    def __init__(
        self,
        blocks: Sequence[AttachedBlock],
        arguments: Sequence[Arguments],
        recipe: Recipe,
        position: Position,
        slowdown: float = 1.0,
        opening: float = 1.0,
        ceiling: float = math.inf,
    ) -> None:
        super().__init__()
        self.slowdown = slowdown
        self.opening = opening
        self.ceiling = ceiling
        self.cause: Cause | None = None
        self.sound: list[State] = []
        self.best: Best | None = None
        self.blocks = nn.ModuleList(blocks)
        for matrix in self.matrices():
            matrix.stability *= opening
        self.arguments = arguments
        self.recipe = recipe
        self.position = position
        self.place = f"block {position.index}"
        self.strict_loading = False  # checkpoints leave the frozen blocks out
        self.after_step: Callable[[BlockCalibration, int], None] | None = None
        self._restored: dict[str, Any] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, hidden) through all blocks of the window."""
        answer = compiled_answer() if self.wanted(self.recipe.compiled) else answer_plainly
        for block, others in zip(self.blocks, self.arguments, strict=True):
            hidden = answer(block, hidden, others)
        return hidden

    def objective(self, hidden: Tensor, target: Tensor) -> Tensor:
        dtype = next(self.blocks[0].block.parameters()).dtype
        return self.recipe.objective.loss(self(hidden.to(dtype)), target)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with self._products():
            return super().training_step(batch, batch_idx)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self._products():
            super().backward(loss, *args, **kwargs)

    def _products(self) -> AbstractContextManager[None]:
        """Weights that linears read in 16 bits are transformed with as many digits."""
        dtype = torch.float16 if "16" in str(self.trainer.precision) else torch.float32
        return products(dtype, self.device)

    def on_fit_start(self) -> None:
        index, places = self.position.index, self._places()
        inverses = [Quantity(index + block, site, "inverse") for block, site, _ in places]
        parameters = [_quantity(name, index) for name, _ in self._trained()]
        self.best = Best(self.state()) if self.recipe.keep_best else None
        self.watch = Watch([*inverses, Quantity(index, "", "loss"), *parameters], self.device)
        self._watched = [parameter.detach() for _, parameter in self._trained()]

    def on_train_epoch_start(self) -> None:
        for matrix in self.matrices():
            matrix.residual.zero_()
            matrix.worst_bound.zero_()

    def recordable(self, samples: int) -> bool:
        full = samples == self.recipe.batch_size
        routed = any(block.architecture.experts for block in self.blocks)  # tokens, which decides every shape
        waits = any(matrix.method == "pivoted" for matrix in self.matrices())  # for the device, inside the library
        return self.wanted(self.recipe.captured) and full and self.steady() and not (routed or waits)

    def changing(self) -> list[Tensor]:
        return [buffer for name, buffer in self.named_buffers() if ".block." not in name]

    def before_update(self, loss: Tensor) -> None:
        if self.best is not None:
            self.best.update(loss, self.own())

    def after_update(self) -> None:
        for block in self.blocks:
            for quantizer in block.quantizers.values():
                quantizer.project()
        for matrix in self.matrices():
            matrix.worst_bound.copy_(torch.maximum(matrix.worst_bound, matrix.project()))
        norms = _norms(self._watched)
        self.watch.update([*(matrix.residual for matrix in self.matrices()), self._step_loss, *norms])

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.is_last_batch:
            self._judge()
        if self.after_step is not None:
            self.after_step(self, batch_idx)

    def _judge(self) -> None:
        """Stops an epoch that nothing good comes back from: callbacks and the next attempt find out why."""
        culprit, loss = self.watch.first(), float(self.loss.compute())
        if culprit is not None:
            self.stop(Cause(culprit.block, culprit.site, culprit.what, None, self.current_epoch))
        elif not loss <= self.ceiling:
            self.stop(Cause(self.position.index, "", "loss", loss, self.current_epoch))

    def stop(self, cause: Cause) -> None:
        """Ends the training of all processes with this epoch, which does not count as sound; the first cause stays."""
        self.cause = self.cause or cause
        self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        if any([matrix.doubt() for matrix in self.matrices()]):
            self.forget()
        cause = next((each for each in distributed.gathered(self.cause) if each is not None), None)
        if cause is not None:
            self.stop(cause)
        else:  # of all epochs only the first, where affine matrices are diagonal, and the last stay
            self.sound = [*self.sound[:1], self.state()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {name: tensor for name, tensor in checkpoint["state_dict"].items() if ".block." not in name}
        checkpoint |= {"state_dict": kept, "window": self._progress(), "random": random_state()}

    def _progress(self) -> dict[str, Any]:
        """What training has come to besides parameters, as plain values."""
        return {
            "buffers": {name: tensor for name, tensor in self.named_buffers() if ".block." not in name},
            "methods": [matrix.method for matrix in self.matrices()],
            "sound": self.sound,
            "cause": self.cause and self.cause.as_dict(),
            "watch": (self.watch.steps, self.watch.since),
            "best": self.best and (self.best.loss, self.best.state),
            "micro_batch": self.micro_batch,
            "stopped": self.trainer.should_stop,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint
        kept = checkpoint["window"]
        for name, tensor in kept["buffers"].items():
            self.get_buffer(name).copy_(tensor)
        for matrix, method in zip(self.matrices(), kept["methods"], strict=True):
            matrix.method = method
        self.sound, self.micro_batch = kept["sound"], kept["micro_batch"]
        self.cause = kept["cause"] and Cause(**kept["cause"])

    def on_train_start(self) -> None:
        if self._restored is not None:
            kept = self._restored["window"]
            for tensor, known in zip((self.watch.steps, self.watch.since), kept["watch"], strict=True):
                tensor.copy_(known)
            if self.best is not None:
                self.best.restore(*kept["best"])
            self.trainer.should_stop = kept["stopped"]
            restore_random_state(self._restored["random"])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, each) for name, each in self.blocks.named_parameters() if each.requires_grad]

    def _places(self) -> list[tuple[int, str, Affine]]:
        """Block of the window, site and matrix, for every affine matrix."""
        return [
            (index, site, part)
            for index, block in enumerate(self.blocks)
            for site, transform in block.transforms.items()
            for part in transform.factors
            if isinstance(part, Affine)
        ]

    def matrices(self) -> list[Affine]:
        """Every affine matrix of the window."""
        return [matrix for _, _, matrix in self._places()]

    def configure_optimizers(self) -> object:
        return optimization(self.blocks, self.recipe, self.slowdown, lambda: self.trainer.estimated_stepping_batches)

    def trainable(self) -> bool:
        """Whether the recipe leaves anything to train."""
        return bool(self._trained())

    def conditions(self) -> dict[str, float]:
        """Condition number of each site's transform, the worst over the window's blocks."""
        sites = {name for block in self.blocks for name in block.transforms}
        return {
            site: max(float(block.transforms[site].condition()) for block in self.blocks if site in block.transforms)
            for site in sorted(sites)
        }

    def margins(self) -> dict[str, float]:
        """How far the least dominant row of each site's affine matrices is from losing its dominance, now."""
        known = {name.partition("/")[::2]: value for name, value in self.invertibility().items()}
        return {site: value for (kind, site), value in known.items() if kind == "margin" and math.isfinite(value)}

    def invertibility(self) -> dict[str, float]:
        """What is known of the affine matrices of each site, the worst over the blocks of the window.

        ``margin/<site>``, now: how far the least dominant row is from losing its dominance. ``bound/<site>`` and
        ``residual/<site>``, over all steps of the epoch: Varah's bound on the condition number, and ``‖I − A A⁻¹‖∞``.
        """
        worst: dict[str, float] = {}
        for _, site, matrix in self._places():
            worst[f"margin/{site}"] = min(float(matrix.margin()), worst.get(f"margin/{site}", math.inf))
            for name, value in (("bound", matrix.worst_bound), ("residual", matrix.residual)):
                worst[f"{name}/{site}"] = max(float(value), worst.get(f"{name}/{site}", -math.inf))
        return worst

    def trained(self) -> dict[str, Tensor]:
        """Every trainable parameter by name, the masks of affine matrices included, in float64 on the host.

        But not what learned rounding adds to each weight, as many numbers as there are weights: the codes say it.
        """
        own = {name: tensor for name, tensor in self.own().items() if not name.endswith(OFFSET)}
        return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in own.items()}

    def state(self) -> State:
        """A copy of :meth:`own`, to return to."""
        return {name: tensor.clone() for name, tensor in self.own().items()}

    def return_to(self, state: State) -> None:
        """Undoes everything since :meth:`state`."""
        self.blocks.load_state_dict(state, strict=False)

    def own(self) -> State:
        """Parameters and masks of transforms and quantizers, by name."""
        return {name: tensor for name, tensor in self.blocks.state_dict().items() if ".block." not in name}


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each; tensors of one dtype share a kernel."""
    found: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        found |= zip(places, torch._foreach_norm([tensors[place] for place in places]), strict=True)
    return [found[place] for place in range(len(tensors))]


def _quantity(name: str, index: int) -> Quantity:
    """What a parameter is called in reports, such as ``0.transforms.value_output.factors.1.matrix``."""
    block, _, site, *rest = name.split(".")
    return Quantity(index + int(block), site.replace("/", "."), rest[-1])


def save_trained(module: BlockCalibration, directory: Path) -> None:
    """Writes ``transforms.safetensors``: what a window learnt, in float64."""
    save_tensors(directory / "transforms.safetensors", module.trained())
