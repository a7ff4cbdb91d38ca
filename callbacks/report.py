"""Metrics of every block and epoch, to the loggers."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from aq_lightning.calibration import BlockCalibration


class Report(Callback):
    """Sends the metrics of each epoch to every logger, with the block as a column and one step count for the run.

    The step is the number of epochs finished since the first block, so that curves of all blocks stand in a row.
    Metrics of a diagonal guard's training have names of their own.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        position, prefix = pl_module.position, "" if pl_module.opening else "diagonal/"
        metrics = {f"{prefix}{name}": float(value) for name, value in trainer.callback_metrics.items()}
        metrics |= {"block": float(position.index), "epoch": float(trainer.current_epoch)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=position.window * (trainer.max_epochs or 1) + trainer.current_epoch)
