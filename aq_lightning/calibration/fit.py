"""Fitting a window so that it never ends worse than it began, and never ends the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.batches import Pairs
from aq_lightning.calibration.block import BlockCalibration, Position
from aq_lightning.calibration.inside import Attempt
from aq_lightning.calibration.observe import Ranges
from aq_lightning.calibration.window import LiveWindow

_SLOWDOWNS = (1.0, 0.1, 0.01)  # of the attempts at a window that diverges


@dataclass(frozen=True)
class Fit:
    """What became of a window."""

    module: BlockCalibration
    """The window with the parameters that were chosen."""
    outcome: str
    """``trained``; or what was better: ``first epoch`` (diagonals only), ``start`` (no training) or ``nearest``
    (no transforms: round-to-nearest)."""
    attempts: int
    """Times it was trained; more than one after divergence."""
    losses: dict[str, float]
    """Objective over all samples, by outcome."""


def fit(
    live: LiveWindow,
    position: Position,
    activations: Sequence[Ranges],
    data: tuple[Tensor, Tensor],
    trainer: Callable[[], Attempt],
    loader: Callable[[], Pairs],
) -> Fit:
    """Trains a window and chooses the best of what it went through.

    A window that diverges (its loss or a parameter is no longer finite) is tried again from the start with smaller
    steps, a bounded number of times.

    Args:
        live: the window's blocks.
        position: where they stand in the run.
        activations: ranges observed at each block's sites.
        data: the quantized stream and the target, each (samples, length, hidden).
        trainer: makes a fresh Trainer for an attempt.
        loader: makes the batches of the data.
    """

    def module(blocks: Sequence[AttachedBlock], slowdown: float = 1.0) -> BlockCalibration:
        return BlockCalibration(blocks, live.arguments, live.recipe, position, slowdown)

    nearest, start = module(live.attach_nearest()), module(live.attach(activations))
    losses = {"start": live.loss(start.blocks, *data)}
    attempts, trained = 0, start
    while trained.trainable() and losses.get("trained", math.inf) == math.inf and attempts < len(_SLOWDOWNS):
        trained = module(live.attach(activations), _SLOWDOWNS[attempts])
        trainer().fit(trained, loader())
        trained.to(live.device)
        losses["trained"] = live.loss(trained.blocks, *data)
        attempts += 1
    losses["nearest"] = live.loss(nearest.blocks, *data)
    best = min(("trained", "start", "nearest"), key=lambda name: losses.get(name, math.inf))
    if trained.first_epoch and (first := _first_epoch_loss(live, trained, data)) < losses[best]:
        losses["first epoch"], best = first, "first epoch"
        trained.return_to_first_epoch()
    chosen = {"trained": trained, "first epoch": trained, "start": start, "nearest": nearest}
    return Fit(chosen[best], best, attempts, losses)


def _first_epoch_loss(live: LiveWindow, trained: BlockCalibration, data: tuple[Tensor, Tensor]) -> float:
    """Objective at the end of the first epoch; the window is left as it was."""
    last = {name: tensor.clone() for name, tensor in trained.own().items()}
    trained.return_to_first_epoch()
    loss = live.loss(trained.blocks, *data)
    trained.blocks.load_state_dict(last, strict=False)
    return loss
