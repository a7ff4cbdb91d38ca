"""The gradual mask's schedule."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from aq_lightning.calibration import BlockCalibration
from aq_lightning.errors import RequestError
from aq_lightning.transforms import Schedule


class GradualMask(Callback):
    """Widens the band of every affine matrix at the start of each epoch: the diagonal first, all of it in the last.

    The mask itself is in :mod:`aq_lightning.transforms.affine`. A matrix whose band widens starts with a fresh
    optimizer state: entries that were shut have no history, and Adam's step count would make their first steps three
    times too long.

    Args:
        fresh_state: whether to; off is the paper's code.
        schedule: ``exact``; ``paper``, with the published code's floating point; or ``none``, all open at once (see
            :func:`aq_lightning.transforms.affine.band_width`).
    """

    def __init__(self, fresh_state: bool = True, schedule: Schedule = "exact") -> None:
        self.fresh_state = fresh_state
        self.schedule = schedule

    def on_train_epoch_start(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise RequestError("The gradual mask needs to know the last epoch, got none: set --trainer.max_epochs.")
        for affine in pl_module.matrices():
            widened = affine.open_band(trainer.current_epoch, trainer.max_epochs, self.schedule)
            for optimizer in trainer.optimizers if widened and self.fresh_state else ():
                optimizer.state.pop(affine.matrix, None)
