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
        device = next(iter(state.values())).device
        self.loss = torch.full((), torch.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, loss: Tensor, now: Mapping[str, Tensor]) -> None:
        """Takes in a batch's loss, a scalar, and the parameters that it was computed with."""
        better = loss < self.loss  # false for a loss that is not a number
        self.loss.copy_(torch.where(better, loss, self.loss))
        for name, kept in self.state.items():
            kept.copy_(torch.where(better, now[name], kept))

    def restore(self, loss: Tensor, state: State) -> None:
        """Goes on from what another knew."""
        self.loss.copy_(loss)
        for name, kept in self.state.items():
            kept.copy_(state[name])
