r"""Scales and norms of all blocks trained together, on what the full-precision model says; codes too if asked for.

The whole model at once sees what blocks one by one cannot: errors of one that another can undo. With zero points
:math:`z` fixed, and codes :math:`u` unless they are to move, the scales :math:`s` of :math:`\hat w = (u - z)\, s` and
the norms and biases of the blocks are trained by the divergence

.. math:: \mathrm{KL}(p \,\|\, \hat p) = \sum_t p_t \log (p_t / \hat p_t)

of the next token's distributions, the mean over all positions; p is what the model's own norm and head make of the
full-precision stream. Training step sizes alone once all codes are fixed is the second phase of EfficientQAT (arXiv
2407.11062), there by the text's own next tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from aq_lightning import distributed
from aq_lightning.calibration.batches import Pairs
from aq_lightning.calibration.block import Position
from aq_lightning.calibration.call import Arguments, answer
from aq_lightning.calibration.captured import Captured
from aq_lightning.calibration.inside import Attempt
from aq_lightning.calibration.optimization import scheduled
from aq_lightning.calibration.products import products
from aq_lightning.calibration.streams import logits, run, to_device
from aq_lightning.calibration.tuned import TunedBlock, TunedWeight
from aq_lightning.calibration.window import LiveWindow, Weights
from aq_lightning.experts import experts_of
from aq_lightning.models.ahead import read_ahead
from aq_lightning.models.loading import Pretrained
from aq_lightning.models.naming import from_checkpoint, to_checkpoint
from aq_lightning.qtensor import QTensor
from aq_lightning.recipe import Recipe

_AGAIN = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn at random
_SMALLEST = 1e-3  # size of a norm or bias that is all but zero, for its steps


class WholeModel(Captured):
    """All blocks with their scales, norms and biases under training, and their codes if the recipe moves them.

    A block's tensors and intermediate results are computed again in the backward pass: beside codes, and what the
    optimizer keeps of what is trained, memory holds one block and one window's logits at a time.

    Args:
        blocks: in order.
        arguments: other arguments of each block, on the training device.
        tail: the model without its blocks; its norm and head turn the last stream into logits.
        recipe: the method, with a :attr:`Recipe.tuning`.
        position: behind all windows, for displays.
    """

    place = "the whole model"

    def __init__(
        self,
        blocks: Sequence[TunedBlock],
        arguments: Sequence[Arguments],
        tail: PreTrainedModel,
        recipe: Recipe,
        position: Position,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.arguments, self.position = arguments, position
        self.tail = tail.requires_grad_(False)
        self.recipe, self.tuning = recipe, recipe.tuning
        self.strict_loading = False  # checkpoints hold what is trained alone
        self.follows = bool(self.tuning.codes)
        self.after_step: Callable[[WholeModel, int], None] | None = None

    def objective(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean divergence; ``hidden`` enters block 0 and ``target`` left the last block of the full-precision model."""
        hidden = hidden.float()
        for block, others in zip(self.blocks, self.arguments, strict=True):
            hidden = checkpoint(answer, block, hidden, others, **_AGAIN)
        parts = [checkpoint(self.divergence, y, t, **_AGAIN) for y, t in zip(hidden, target, strict=True)]
        return torch.stack(parts).mean()

    def divergence(self, given: Tensor, wanted: Tensor) -> Tensor:
        """Mean over the positions of one window, float32, from what last blocks answer, (length, hidden) each."""
        with torch.no_grad():
            p = logits(self.tail, wanted[None].float())[0].float().log_softmax(-1)  # (length, vocabulary), like q
        q = logits(self.tail, given[None].float())[0].float().log_softmax(-1)
        return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()

    @torch.no_grad()
    def score(self, stream: Tensor, target: Tensor) -> float:
        """Mean divergence over all windows of all processes, in float32; infinite if any is not finite.

        Args:
            stream: what enters block 0, (samples, length, hidden).
            target: what the last block of the full-precision model answers, the same shape.
        """
        answered = run(self.blocks, self.arguments, stream, self.tuning.batch_size, self.device)
        with products(stream.dtype, self.device):
            pairs = zip(answered, target, strict=True)
            parts = [self.divergence(y.to(self.device), t.to(self.device)) for y, t in pairs]
        mean = float(distributed.mean(torch.stack(parts)))
        return mean if math.isfinite(mean) else math.inf

    def configure_optimizers(self) -> object:
        steps = self.recipe.scheme.weight.levels - 1  # of the grid, from end to end
        groups = [{"params": [weight.ratio for weight in self.weights()], "lr": self.tuning.scales / steps}]
        if self.tuning.codes:
            groups.append({"params": [weight.offset for weight in self.weights()], "lr": self.tuning.codes * steps})
        for vector in (vector for block in self.blocks for vector in block.vectors.values()):
            size = max(float(vector.detach().square().mean().sqrt()), _SMALLEST)
            groups.append({"params": [vector], "lr": self.tuning.norms / steps * size})
        return scheduled(self.recipe.optimizer(groups), "cosine", int(self.trainer.estimated_stepping_batches))

    def weights(self) -> list[TunedWeight]:
        """Every quantized weight."""
        return [weight for block in self.blocks for weight in block.weights.values()]

    def before_update(self, loss: Tensor) -> None:
        """Nothing: the start and the end are compared when training is over."""

    def recordable(self, samples: int) -> bool:
        full = samples == self.tuning.batch_size
        routed = any(experts_of(block) for block in self.blocks)  # tokens, which decides every shape
        return self.wanted(self.recipe.captured) and full and self.steady() and not routed

    def changing(self) -> list[Tensor]:
        return []

    def after_update(self) -> None:
        for weight in self.weights():
            weight.project()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.after_step is not None:
            self.after_step(self, batch_idx)

    def on_train_epoch_end(self) -> None:
        epoch, divergence = self.current_epoch, float(self.loss.compute())
        for logger in self.trainer.loggers:
            logger.log_metrics({"divergence": divergence, "epoch": float(epoch)}, step=epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {name: tensor for name, tensor in checkpoint["state_dict"].items()
                if not name.startswith("tail.") and ".block." not in name}  # fmt: skip
        checkpoint |= {"state_dict": kept, "micro_batch": self.micro_batch}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.micro_batch = checkpoint["micro_batch"]

    def trained(self, model: Pretrained) -> dict[str, QTensor | Tensor]:
        """Quantized weights, or their scales alone if codes stay, under the weights' names, and norms and biases, as
        checkpoints name them."""
        found: dict[str, QTensor | Tensor] = {}
        for index, block in enumerate(self.blocks):
            named = to_checkpoint(block.tensors(), model.architecture, model.blocks[index])
            for name, tensor in named.items():
                full = f"{model.architecture.blocks}.{index}.{name}"
                if isinstance(tensor, QTensor) and self.tuning.codes:
                    found[full] = tensor
                else:
                    found[full] = (tensor.scale if isinstance(tensor, QTensor) else tensor).cpu().clone()
        return found


def assemble(
    model: Pretrained,
    recipe: Recipe,
    arguments: Sequence[Arguments],
    weights: Callable[[int], Weights],
    device: torch.device,
) -> WholeModel:
    """The quantized model, ready for a Trainer.

    Args:
        model: where the parts outside the blocks come from.
        recipe: the method, with a :attr:`Recipe.tuning`.
        arguments: other arguments of every block.
        weights: of the window that starts at a block, by their full names in checkpoints.
        device: where to train.
    """
    count, architecture, blocks = len(model.blocks), model.architecture, []
    windows = list(recipe.plan.windows(count))
    indices = [(window.start, index) for window in windows for index in window]
    for (start, index), block in zip(indices, read_ahead(model.block, range(count)), strict=True):
        live = LiveWindow(model, {index: block}, {index: arguments[index]}, recipe, device)
        prefix = f"{architecture.blocks}.{index}."
        stored = weights(start)
        mine = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
        live.install(stored)
        tensors = from_checkpoint(mine, architecture)
        drawn = torch.Generator().manual_seed(index) if recipe.tuning.codes else None
        blocks.append(TunedBlock(live.blocks[0], tensors, drawn).to(device))
    tail = model.shell().float().to(device)
    position = Position(count, len(windows), len(windows))
    return WholeModel(blocks, to_device(list(arguments), device), tail, recipe, position).to(device)


@dataclass(frozen=True)
class Tuned:
    """What became of a model."""

    tensors: dict[str, QTensor | Tensor]
    """As :meth:`WholeModel.trained` gives them; none where training did not help."""
    before: float
    """Mean divergence over all windows."""
    after: float
    """The same behind training, whether or not its result was taken."""


def tune(
    whole: WholeModel,
    model: Pretrained,
    data: tuple[Tensor, Tensor],
    trainer: Callable[[], Attempt],
    loader: Callable[[], Pairs],
) -> Tuned:
    """Trains all blocks together, and takes what became of them if the divergence over all windows is less than before.

    Args:
        whole: the quantized model.
        model: the one that it comes from.
        data: what enters block 0, and what the last block answers in full precision, (samples, length, hidden) each.
        trainer: makes a fresh Trainer.
        loader: makes the batches of the data.
    """
    before = whole.score(*data)
    trainer().fit(whole, loader())
    after = whole.score(*data)
    return Tuned(whole.trained(model) if after < before else {}, before, after)


def retuned(weights: Weights, tensors: Weights) -> dict[str, QTensor | Tensor]:
    """A window's weights with what :func:`tune` trained in the place of their own.

    Args:
        weights: by their full names in checkpoints.
        tensors: as :meth:`WholeModel.trained` gives them; those that are missing stay.
    """
    result = dict(weights)
    for name in weights.keys() & tensors.keys():
        own, new = weights[name], tensors[name]
        scale = isinstance(own, QTensor) and not isinstance(new, QTensor)
        result[name] = replace(own, scale=new) if scale else new
    return result
