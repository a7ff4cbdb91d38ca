"""Fitting a window so that it never ends worse than it began, and never ends the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.batches import Pairs
from aq_lightning.calibration.best import State
from aq_lightning.calibration.block import BlockCalibration, Position
from aq_lightning.calibration.inside import Attempt
from aq_lightning.calibration.observe import Ranges
from aq_lightning.calibration.watch import Cause
from aq_lightning.calibration.window import LiveWindow

_CAUTION = (1.0, 0.1, 0.01)  # of the attempts at a window: factors on step sizes and stability factors
_EXPLODED = 100.0  # an epoch whose mean loss is that many times the start's has diverged


@dataclass(frozen=True)
class Fit:
    """What became of a window."""

    module: BlockCalibration
    """The window with the parameters that were chosen."""
    outcome: str
    """``trained``; or what was better: ``best step`` (whose batch had the least loss, if the recipe asks for it),
    ``rolled back`` (the last sound epoch of a training that was stopped), ``first epoch`` (affine matrices still
    diagonal), ``diagonal`` (trained with diagonal matrices), ``start`` (no training) or ``nearest`` (no transforms:
    round-to-nearest)."""
    attempts: int
    """Times it was trained; more than one after an attempt that was stopped."""
    losses: dict[str, float]
    """Objective over all samples, by outcome."""
    causes: tuple[Cause, ...]
    """Why attempts were stopped, in order."""
    seconds: float
    """Of all training, since the run last went on."""


@dataclass(frozen=True)
class _Candidate:
    """A state that a window can be left in."""

    outcome: str
    module: BlockCalibration
    state: State
    loss: float


def fit(
    live: LiveWindow,
    position: Position,
    activations: Sequence[Ranges],
    data: tuple[Tensor, Tensor],
    trainer: Callable[[], Attempt],
    loader: Callable[[], Pairs],
) -> Fit:
    """Trains a window and chooses the best of what it went through.

    An attempt is stopped when its loss or a parameter is no longer finite, when its loss explodes, or by a callback
    (:meth:`BlockCalibration.stop`). The window is then tried again from the start with smaller steps and smaller
    stability factors, a bounded number of times.

    Args:
        live: the window's blocks.
        position: where they stand in the run.
        activations: ranges observed at each block's sites.
        data: the quantized stream and the target, each (samples, length, hidden).
        trainer: makes a fresh Trainer for an attempt.
        loader: makes the batches of the data.
    """
    return _Fitting(live, position, activations, data, trainer, loader).best()


class _Fitting:
    """The arguments of :func:`fit`, and what is tried with them."""

    def __init__(
        self,
        live: LiveWindow,
        position: Position,
        activations: Sequence[Ranges],
        data: tuple[Tensor, Tensor],
        trainer: Callable[[], Attempt],
        loader: Callable[[], Pairs],
    ) -> None:
        self.live, self.position, self.activations = live, position, activations
        self.data, self.trainer, self.loader, self.seconds = data, trainer, loader, 0.0
        plain = self.module(live.attach(activations, data[0]))
        self.start = self.candidate("start", plain, plain.state())

    def best(self) -> Fit:
        """Everything that the recipe asks for, and the one with the least loss."""
        plain = self.start.module
        diagonal, trained, causes, attempts = [], [], [], 0
        if plain.trainable():
            if plain.matrices() and self.live.recipe.diagonal_guard:
                diagonal, _ = self.train(opening=0.0)
            trained, causes = self.train(opening=1.0, attached=plain.blocks)
            attempts = min(len(causes) + 1, len(_CAUTION))
        rounded = self.module(self.live.attach_nearest(self.data[0]))
        nearest = self.candidate("nearest", rounded, rounded.state())
        candidates = [*trained, *(replace(each, outcome="diagonal") for each in diagonal), self.start, nearest]
        best = min(candidates, key=lambda each: each.loss)
        best.module.return_to(best.state)
        for block in best.module.blocks:
            block.claim()
        losses = {each.outcome: each.loss for each in sorted(candidates, key=lambda each: -each.loss)}
        return Fit(best.module, best.outcome, attempts, losses, tuple(causes), self.seconds)

    def train(
        self, opening: float, attached: Sequence[AttachedBlock] | None = None
    ) -> tuple[list[_Candidate], list[Cause]]:
        """Attempts until one is not stopped: what they leave, and why those before it were stopped. The first may use
        blocks ``attached`` before, as they were then."""
        candidates, causes = [], []
        for caution in _CAUTION:
            blocks, attached = attached or self.live.attach(self.activations, self.data[0]), None
            module = self.module(blocks, caution, opening * caution, _EXPLODED * self.start.loss)
            began, batches = time.monotonic(), self.loader()
            self.trainer().fit(module, batches)  # waits for its last epoch's loss
            batches.let_go()
            self.seconds += time.monotonic() - began
            if module.cause is None:
                candidates.append(self.candidate("trained", module, module.state()))
                if candidates[-1].loss == math.inf:  # the last step was too much
                    module.cause = Cause(self.position.index, "", "loss", None, module.current_epoch)
            elif module.sound:
                candidates.append(self.candidate("rolled back", module, module.sound[-1]))
            if module.best is not None:
                candidates.append(self.candidate("best step", module, module.best.state))
            if module.cause is None:
                break
            causes.append(module.cause)
        first = [self.candidate("first epoch", module, state) for state in module.sound[:-1]]
        return candidates + first, causes

    def module(self, blocks: Sequence[AttachedBlock], *cautions: float) -> BlockCalibration:
        """A window ready for a Trainer."""
        return BlockCalibration(blocks, self.live.arguments, self.live.recipe, self.position, *cautions)

    def candidate(self, outcome: str, module: BlockCalibration, state: State) -> _Candidate:
        """A state and its loss over all samples."""
        module.return_to(state)
        return _Candidate(outcome, module, state, self.live.loss(module.blocks, *self.data))
