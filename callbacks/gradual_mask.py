"""The gradual mask's schedule."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from aq_lightning.calibration import BlockCalibration
from aq_lightning.errors import RequestError
from aq_lightning.transforms import Affine


class GradualMask(Callback):
    """Widens the band of every affine matrix at the start of each epoch: the diagonal first, all of it in the last.

    The mask itself is in :mod:`aq_lightning.transforms.affine`.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise RequestError("The gradual mask needs to know the last epoch, got none: set --trainer.max_epochs.")
        for module in pl_module.modules():
            if isinstance(module, Affine):
                module.open_band(trainer.current_epoch, trainer.max_epochs)
