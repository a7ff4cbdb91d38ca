"""Watching how far each transform is from singular."""

from __future__ import annotations

import warnings

from lightning.pytorch import Callback, Trainer

from aq_lightning.calibration import BlockCalibration


class ConditionNumber(Callback):
    """Logs ``condition/<site>`` and ``margin`` at the end of each epoch and warns of ill-conditioned transforms.

    The condition number bounds how much an activation's rounding error can grow on its way through ``A⁻¹`` and back.
    The margin is how far the least dominant row of any affine matrix is from losing its dominance: 1 for a diagonal
    matrix, above 0 while Levy–Desplanques guarantees an inverse.

    Args:
        warn_above: condition number from which a warning names block and site.
    """

    def __init__(self, warn_above: float = 1e6) -> None:
        self.warn_above = warn_above

    def on_train_epoch_end(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        conditions = pl_module.conditions()
        pl_module.log_dict({f"condition/{site}": value for site, value in conditions.items()}, logger=False)
        margins = [float(affine.margin()) for affine in pl_module.matrices()]
        if margins:
            pl_module.log("margin", min(margins), logger=False)
        for site, value in conditions.items():
            if not value <= self.warn_above:  # a NaN warns too
                warnings.warn(
                    f"block {pl_module.position.index}, {site}: condition number {value:.1e} in epoch "
                    f"{trainer.current_epoch}; lower learning_rates.transform or the stability factor.",
                    stacklevel=2,
                )
