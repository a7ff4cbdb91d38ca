"""One display over all blocks and epochs."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from aq_lightning.calibration import BlockCalibration, peak_memory


class Progress(Callback):
    """A bar over the epochs of all blocks, with block, epoch, loss, speed, peak memory and the time left; silent when
    not on a terminal, where the lines that tell of each block are what remains.

    A block that is trained again (an attempt after one that was stopped, a diagonal guard) starts again on the bar.

    Args:
        show: whether to show it; None: on a terminal only.
    """

    def __init__(self, show: bool | None = None) -> None:
        self.show = show
        self.bar: tqdm | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        position, epochs = pl_module.position, max(trainer.max_epochs or 0, 1)
        done = position.window * epochs
        if self.bar is None and trainer.is_global_zero:
            self.bar = tqdm(
                total=position.windows * epochs,
                initial=done,
                unit="epoch",
                disable=None if self.show is None else not self.show,
                dynamic_ncols=True,
                leave=False,
            )
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_description(f"block {position.window + 1}/{position.windows}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        if self.bar is not None:
            loss = trainer.callback_metrics.get("loss")
            self.bar.set_postfix(
                epoch=f"{trainer.current_epoch + 1}/{trainer.max_epochs}",
                loss="-" if loss is None else f"{float(loss):.3g}",
                memory=f"{peak_memory(pl_module.device) / 1e9:.1f}GB",
                refresh=False,
            )
            self.bar.update()
            self.bar.refresh()  # however short an epoch is

    def on_fit_end(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        if self.bar is not None and pl_module.position.window + 1 == pl_module.position.windows:
            self.bar.close()
