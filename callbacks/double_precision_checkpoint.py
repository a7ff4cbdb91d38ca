"""Keeping what was learnt in full."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from aq_lightning.calibration import BlockCalibration, save_trained


class DoublePrecisionCheckpoint(Callback):
    """Saves a window's transforms and clipping in float64, ``transforms.safetensors`` in the window's directory."""

    def on_fit_end(self, trainer: Trainer, pl_module: BlockCalibration) -> None:
        if trainer.is_global_zero:
            save_trained(pl_module, Path(trainer.default_root_dir))
