"""The blocks that are live together, and what is done with them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from aq_lightning import distributed
from aq_lightning.calibration.attach import AttachedBlock, BlockFunction, attach, gained_biases, install, merge
from aq_lightning.calibration.cache import choose_cache
from aq_lightning.calibration.observe import Ranges, initialize
from aq_lightning.calibration.rounding import Codes, FoldedBlock, Passes, balance, choose_ranges, choose_scales, rounded
from aq_lightning.calibration.streams import Arguments, Streams, check_finite, each_answer, gathered, run, to_device
from aq_lightning.models.loading import Pretrained
from aq_lightning.models.naming import from_checkpoint, to_checkpoint
from aq_lightning.models.sites import Architecture, Heads
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import MinMax
from aq_lightning.recipe import Recipe

_HALF = 4e-3  # relative error of what blocks add, several times that of products which begin in 11 bits

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
        self.began = time.monotonic()  # the work on this window, for its metrics
        self.pretrained = pretrained
        self.recipe = recipe
        self.indices = list(blocks)
        self.device = device
        self.blocks = [block.to(device).float() for block in blocks.values()]  # half as much to move as the other way
        self.arguments = [to_device(arguments[index], device) for index in blocks]
        architecture = pretrained.architecture
        on = switches(self.blocks[0], architecture, pretrained.heads, recipe)
        self._biased = [linear for switch in on for linear in architecture.bias_switches[switch]]
        self._half = device.type == "cuda" and recipe.streams.torch_dtype == torch.float16

    def run(
        self, stream: Tensor, exact: bool = False, become: Callable[[slice, Tensor], Tensor] = lambda _, answer: answer
    ) -> Tensor:
        """The blocks' answer to a stream, (samples, length, hidden) → a new one. On a GPU blocks that answer in float16
        compute in it where that suffices; ``exact``: they never do, for what is looked at on the way. What the answer
        to some samples becomes by ``become``, on the device, is kept in its place."""
        for half in (True, False) if not exact and self._half_suffices(self.blocks, stream[:1]) else (False,):
            passes = each_answer(self.blocks, self.arguments, stream, self.recipe.batch_size, self.device, half)
            found, finite = gathered(((where, become(where, answer)) for where, answer in passes), stream)
            if finite:
                break
        return check_finite(found, finite)

    def target(self, full: Tensor, inputs: Tensor) -> Tensor:
        """What the window is to answer, a stream.

        Args:
            full: the answer to the full-precision stream.
            inputs: the quantized stream.

        Returns:
            A new stream if the objective has two teachers, else ``full``.
        """
        objective = self.recipe.objective
        if not objective.same_input:
            return objective.target(full, None)
        return self.run(
            inputs, become=lambda where, same: objective.target(full[where].to(self.device, non_blocking=True), same)
        )

    def attach(self, activations: Sequence[Ranges], inputs: Tensor) -> list[AttachedBlock]:
        """The recipe on each block, its transforms started from the activations observed, its ranges chosen for what
        the blocks read when the stream ``inputs``, (samples, length, hidden), enters the window; the same in every
        process."""
        attached = [self._attach(block, self.recipe.transforms, self.recipe.weight_quantizer) for block in self.blocks]
        for block, plain, ranges, passes in zip(attached, self.blocks, activations, self._passes(), strict=True):
            initialize(block, ranges)
            choose_scales(block, passes, inputs)
            balance(block, passes, inputs)
            choose_cache(block, passes, inputs)
            choose_ranges(block, passes, inputs)
            for part in (block.transforms, block.quantizers):
                distributed.agree(part)
            inputs = passes.run(plain, inputs) if block is not attached[-1] else inputs
        return attached

    def attach_nearest(self, inputs: Tensor) -> list[AttachedBlock]:
        """Round-to-nearest on each block, without transforms but what the scheme asks for; ``inputs`` as above."""
        attached = [self._attach(block, {}, MinMax) for block in self.blocks]
        for block, plain, passes in zip(attached, self.blocks, self._passes(), strict=True):
            choose_cache(block, passes, inputs)
            inputs = passes.run(plain, inputs) if block is not attached[-1] else inputs
        return attached

    def loss(self, blocks: Sequence[nn.Module], inputs: Tensor, target: Tensor) -> float:
        """Mean objective over all samples of this window's blocks, attached or plain; infinite if any is not finite.

        Every process gives its samples, and gets the mean over those of all. On a GPU blocks that answer in float16
        compute in it where that suffices.
        """
        functions = [block.snapshot() if isinstance(block, AttachedBlock) else block for block in blocks]
        half = self._half_suffices(functions, inputs[:1])
        losses = self._losses(functions, inputs, target, half)
        if half and not losses.isfinite().all():
            losses = self._losses(functions, inputs, target, half=False)
        return _mean(losses)

    def answers(self, inputs: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """One exact pass of the blocks as they are: their :meth:`loss`, and what :meth:`run` returns.

        Args:
            inputs: what enters the window, (samples, length, hidden).
            target: what to answer; if it is a stream of its own (:meth:`target`), the answers take its place.

        Raises:
            RequestError: they enter the next window, and are not finite in the dtype of streams.
        """
        losses: list[Tensor] = []
        judged = self._judged(self.blocks, inputs, target, half=False, losses=losses)
        found, finite = gathered(judged, inputs, into=target if self.recipe.objective.same_input else None)
        return _mean(torch.stack(losses)), found if self.recipe.inputs == "full" else check_finite(found, finite)

    def round(
        self, attached: Sequence[AttachedBlock], streams: Streams, target: Tensor, ceiling: float
    ) -> tuple[list[Codes], float | None]:
        """What the recipe's rounder makes of the blocks.

        Args:
            attached: the blocks after training.
            streams: what enters the window.
            target: what to answer.
            ceiling: the blocks' loss with the codes of their own quantizers.

        Returns:
            Codes block by block, none where the quantizers' own are better or no rounder is asked for; and the loss
            with the rounder's.
        """
        own: list[Codes] = [{} for _ in attached]
        if not self.recipe.rounder.reads:
            return own, None
        codes, functions, entering = [], [], streams
        for block, plain, passes in zip(attached, self.blocks, self._passes(), strict=True):
            codes.append(rounded(block, self.recipe.rounder, passes, entering))
            functions.append(FoldedBlock(block, passes).function(codes[-1]))
            if block is not attached[-1]:
                entering = Streams(passes.run(plain, entering.full), passes.run(functions[-1], entering.quantized))
        loss = self.loss(functions, streams.quantized, target)
        return (codes if loss <= ceiling else own), loss

    def merge(self, attached: Sequence[AttachedBlock], codes: Sequence[Codes]) -> dict[str, QTensor | Tensor]:
        """Rounds for good, to the codes given where there are any; the model's tensors by their full names in
        checkpoints."""
        architecture = self.pretrained.architecture
        return {
            f"{architecture.blocks}.{index}.{name}": tensor
            for index, block, mine in zip(self.indices, attached, codes, strict=True)
            for name, tensor in to_checkpoint(
                merge(block, self.pretrained.storage, self._biased, mine), architecture, block.block
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

    def _passes(self) -> list[Passes]:
        return [Passes(arguments, self.recipe.batch_size, self.device) for arguments in self.arguments]

    def _losses(self, blocks: Sequence[BlockFunction], inputs: Tensor, target: Tensor, half: bool) -> Tensor:
        """The objective of each sample, (samples), on the device."""
        losses: list[Tensor] = []
        for _ in self._judged(blocks, inputs, target, half, losses):
            pass
        return torch.stack(losses)

    @torch.no_grad()
    def _judged(
        self, blocks: Sequence[BlockFunction], inputs: Tensor, target: Tensor, half: bool, losses: list[Tensor]
    ) -> Iterator[tuple[slice, Tensor]]:
        """What blocks answer, part by part, as :func:`each_answer` gives it; the objective of each sample, a scalar on
        the device, goes to ``losses``."""
        for where, answer in each_answer(blocks, self.arguments, inputs, self.recipe.batch_size, self.device, half):
            wanted = target[where].to(self.device, non_blocking=True)
            losses += map(self.recipe.objective.loss, answer.split(1), wanted.split(1))
            del wanted
            yield where, answer
            del answer

    def _half_suffices(self, blocks: Sequence[BlockFunction], sample: Tensor) -> bool:
        """Whether passes may take float16, which neither overflows nor loses what is small, for one sample."""
        if not self._half:
            return False
        sample = sample.to(self.device).float()
        near, exact = (run(blocks, self.arguments, sample, 1, self.device, half=half) for half in (True, False))
        return float((near - exact).norm()) <= _HALF * float((exact - sample).norm())

    def _attach(self, block: nn.Module, transforms: Mapping, weight_quantizer: object) -> AttachedBlock:
        model = self.pretrained
        scheme = self.recipe.scheme
        return attach(block, model.architecture, model.heads, transforms, weight_quantizer, scheme, model.storage)


def _mean(losses: Tensor) -> float:
    """Over the samples of all processes; infinite if any is not finite."""
    mean = float(distributed.mean(losses))
    return mean if math.isfinite(mean) else math.inf


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
