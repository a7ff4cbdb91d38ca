"""A stage before all blocks: windows of text that the full-precision model writes itself, once for a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from aq_lightning import distributed
from aq_lightning.calibration import RunDirectory, check_memory, written_windows
from aq_lightning.durable import digest, manifest, remove, save_tensors, sealed
from aq_lightning.models.pretrained import Pretrained
from aq_lightning.recipe import Recipe

_TENSORS = "written.safetensors"
_AT_ONCE = 128  # texts


@dataclass(frozen=True)
class Writing:
    """What the stage works with."""

    pretrained: Pretrained
    """The model."""
    recipe: Recipe
    """Its tuning says how much is written."""
    journal: RunDirectory
    """Where the tokens go; if they are there they are taken from it."""
    device: torch.device
    """Where the model writes."""
    seed: int
    """Of what it writes."""

    def windows(self, given: Tensor) -> Tensor:
        """What the last stage passes over beside the calibration windows ``given``; written by the leading process, for
        all. The streams that are kept hold it too, so that all windows of blocks stand on it.

        Args:
            given: tokens, int64 (samples, length).

        Returns:
            int64 (windows, length).
        """
        count = 0 if self.recipe.tuning is None else self.recipe.tuning.written
        if not count:
            return given[:0]
        place = self.journal.path / "written"
        if distributed.leads() and manifest(place) is None:
            check_memory(self.pretrained, self.device, "Text is written", "set --model.tuning.written 0")
            tokens = written_windows(self.pretrained, given, count, _AT_ONCE, self.seed, self.device)
            if place.exists():
                remove(place)  # damaged
            with sealed(place) as partial:
                save_tensors(partial / _TENSORS, {"tokens": tokens})
        tokens = load_file(place / _TENSORS)["tokens"] if distributed.leads() else None
        sums = distributed.from_first(digest(place / _TENSORS) if distributed.leads() else None)
        self.journal.foundation = " ".join(each for each in (self.journal.foundation, sums) if each)
        return distributed.from_first(tokens)
