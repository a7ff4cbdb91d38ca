"""The best step of a training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Parameters and masks of a window's transforms and quantizers, by name."""


class Best:
    """The parameters whose batch had the least loss so far, kept without waiting for the device.

    Batches differ, so this is an estimate; who chooses among candidates computes their losses over all samples.

    Args:
        state: a copy of the parameters before training, which is written over.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.loss: Tensor | None = None  # scalar

    @torch.no_grad()
    def update(self, loss: Tensor, now: Mapping[str, Tensor]) -> None:
        """Takes in a batch's loss, a scalar, and the parameters that it was computed with."""
        last = torch.full_like(loss, torch.inf) if self.loss is None else self.loss
        better = loss < last  # false for a loss that is not a number
        self.loss = torch.where(better, loss, last)
        for name, kept in self.state.items():
            kept.copy_(torch.where(better, now[name], kept))
