"""One display over all blocks and epochs."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from aq_lightning.calibration import BlockCalibration


class Progress(Callback):
    """A bar over the epochs of all blocks, with the last loss and the time left; silent when not on a terminal.

    Args:
        show: whether to show it; None: on a terminal only.
    """

    def __init__(self, show: bool | None = None) -> None:
        self.show = show
        self.bar: tqdm | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        if self.bar is None and trainer.is_global_zero:
            epochs = max(trainer.max_epochs or 0, 1)
            position = pl_module.position
            self.bar = tqdm(
                total=position.windows * epochs,
                initial=position.window * epochs,
                unit="epoch",
                disable=None if self.show is None else not self.show,
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        if self.bar is not None:
            loss = trainer.callback_metrics.get("loss")
            self.bar.set_description(f"block {pl_module.position.window + 1}/{pl_module.position.windows}")
            self.bar.set_postfix(loss="-" if loss is None else f"{float(loss):.3g}")
            self.bar.update()

    def on_fit_end(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        if self.bar is not None and pl_module.position.window + 1 == pl_module.position.windows:
            self.bar.close()
