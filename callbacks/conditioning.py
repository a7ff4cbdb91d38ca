"""Watching how far each transform is from singular."""

from __future__ import annotations

import math
import warnings

from lightning.pytorch import Callback, Trainer

from aq_lightning.calibration import BlockCalibration, Cause
from aq_lightning.errors import RequestError


class ConditionNumber(Callback):
    """Logs how invertible the transforms of each site are at the end of each epoch; warns of ill ones and stops worse.

    ``condition/<site>`` is the true condition number, in float64: it bounds how much an activation's rounding error can
    grow on its way through ``A⁻¹`` and back. For affine matrices there are also ``margin/<site>``, how far the least
    dominant row is from losing its dominance (1 for a diagonal matrix, above 0 while Levy–Desplanques guarantees an
    inverse), and over all steps of the epoch ``bound/<site>``, Varah's bound on the condition number in the ∞-norm,
    and ``residual/<site>``, ``‖I − A A⁻¹‖∞`` of the inverses that were used.

    Args:
        warn_above: condition number from which a warning names block and site.
        stop_above: condition number that stops the attempt: its last sound epoch is kept, and the window is tried
            again with more caution. The default is where float32 has lost all digits.
    """

    def __init__(self, warn_above: float = 1e6, stop_above: float = 1e8) -> None:
        if not 1 <= warn_above <= stop_above:
            raise RequestError(
                f"A warning comes before the stop, got warn_above {warn_above:g} and stop_above {stop_above:g}: "
                "leave ConditionNumber's defaults, 1e6 and 1e8."
            )
        self.warn_above = warn_above
        self.stop_above = stop_above

    def on_train_epoch_end(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        conditions = pl_module.conditions()
        pl_module.log_dict({f"condition/{site}": value for site, value in conditions.items()}, logger=False)
        pl_module.log_dict(pl_module.invertibility(), logger=False)
        if pl_module.cause is not None:  # what is not finite has no condition
            return
        for site, value in conditions.items():
            if not value <= self.warn_above:  # a NaN warns too
                warnings.warn(
                    f"block {pl_module.position.index}, {site}: condition number {value:.1e} in epoch "
                    f"{trainer.current_epoch}; lower learning_rates.transform or the stability factor.",
                    stacklevel=2,
                )
            if not value <= self.stop_above:
                known = value if math.isfinite(value) else None
                cause = Cause(pl_module.position.index, site, "condition number", known, trainer.current_epoch)
                pl_module.stop(cause)
