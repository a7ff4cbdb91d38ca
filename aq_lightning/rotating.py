"""A stage before all blocks: rotations learnt on the whole model, once for a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from aq_lightning import distributed
from aq_lightning.calibration import RunDirectory, Stopping, capture, check_memory
from aq_lightning.calibration.learned_rotation import RotationFit, Text, full_answers
from aq_lightning.durable import digest, manifest, remove, save_tensors, sealed, write_json
from aq_lightning.errors import RequestError
from aq_lightning.models.pretrained import Pretrained
from aq_lightning.quantizers import quantized
from aq_lightning.recipe import Recipe
from aq_lightning.transforms import LearnedRotation, Rotation

_TENSORS = "rotation.safetensors"
_METRICS = "metrics.json"


@dataclass(frozen=True)
class Rotating:
    """What the stage works with."""

    pretrained: Pretrained
    """The model."""
    recipe: Recipe
    """Its rotation, scheme and transforms."""
    journal: RunDirectory
    """Where the matrices go; if they are there they are taken from it."""
    trainer: Callable[..., Trainer]
    """Makes a Trainer for this process alone, with the changes given."""
    stopping: Stopping
    """What a signal comes to: the stage has no place to go on from inside."""
    seed: int
    """Of the order in which windows are visited."""

    def rotation(self, windows: Tensor) -> Rotation | LearnedRotation | None:
        """What the recipe asks for; learnt, if it says so, by the leading process, for all. The windows of blocks that
        are finished stand on it.

        Args:
            windows: calibration tokens, int64 (samples, length).
        """
        if self.recipe.rotation is None or self.recipe.rotation.training is None:
            return self.recipe.rotation
        place = self.journal.path / "rotation"
        if distributed.leads() and manifest(place) is None:
            self._learn(place, windows)
        learned = LearnedRotation(**load_file(place / _TENSORS)) if distributed.leads() else None
        self.journal.foundation = distributed.from_first(digest(place / _TENSORS) if distributed.leads() else None)
        return distributed.from_first(learned)

    def _learn(self, place: Path, windows: Tensor) -> None:
        plan, trainer = self.recipe.rotation.training, self._trainer(place)
        device = trainer.strategy.root_device
        check_memory(
            self.pretrained, device, "Rotations are learnt", "set --model.rotation.training null for one not learnt"
        )
        shell = self.pretrained.shell()
        text = Text(windows, *capture(shell, windows, self.recipe.streams, device), None)
        if plan.objective == "divergence":
            text = replace(text, answers=full_answers(self.pretrained, text, plan.batch_size, device))
        module = RotationFit(self.pretrained, shell, text, self.recipe)
        start, size = module.learned(), min(plan.batch_size, len(windows))
        order = torch.Generator().manual_seed(self.seed)
        indices: Any = range(len(windows))
        loader = DataLoader(indices, size, shuffle=True, drop_last=True, generator=order)
        try:
            with quantized([each.block for each in module.blocks], self.recipe.scheme):
                before = self._mean(module, DataLoader(indices, size), place)
                trainer.fit(module, loader)
                after = self._mean(module, DataLoader(indices, size), place)
        except torch.OutOfMemoryError as error:
            raise RequestError(
                f"A step of rotations holds {size} windows of {windows.shape[1]} tokens at every block's entrance, got "
                f"too little memory on {device}: lower model.rotation.training.batch_size, or set "
                "--model.streams.place host."
            ) from error
        better = math.isfinite(after) and after < before
        learned = module.learned() if better else start
        if place.exists():
            remove(place)  # damaged
        with sealed(place) as partial:
            save_tensors(partial / _TENSORS, vars(learned))
            write_json(partial / _METRICS, {"loss before": before, "loss after": after, "kept": better})

    def _trainer(self, place: Path) -> Trainer:
        steps = self.recipe.rotation.training.steps
        return self.trainer(max_steps=steps, max_epochs=-1, callbacks=[_Listening(self.stopping)], **_alone(place))

    def _mean(self, module: RotationFit, loader: DataLoader, place: Path) -> float:
        """Mean loss over all windows."""
        module.loss.reset()
        self.trainer(callbacks=[], **_alone(place)).test(module, loader, verbose=False)
        return float(module.loss.compute())


def _alone(place: Path) -> dict[str, object]:
    """Options of a Trainer whose steps are no block's."""
    return {"logger": False, "default_root_dir": str(place.parent), "accumulate_grad_batches": 1}


class _Listening(Callback):
    """Gives signals back to the run, once Lightning has taken them."""

    def __init__(self, stopping: Stopping) -> None:
        self.stopping = stopping

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stopping.take_back()
