"""Shuffled batches of a window's inputs and targets, which can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Pairs:
    """Batches (inputs, targets), each (batch, length, hidden), in another order every epoch; the same seed gives the
    same orders.

    A Trainer keeps :meth:`state_dict` in its checkpoints, and goes on behind the last batch that it took.

    Args:
        inputs: (samples, length, hidden).
        targets: same shape.
        batch_size: samples in a batch; the last may hold fewer.
        seed: of the orders.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> None:
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._before = self._generator.get_state()  # what the order of this epoch was drawn from
        self._taken = len(self)  # batches of this epoch

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._taken == len(self):
            self._before, self._taken = self._generator.get_state(), 0
        self._generator.set_state(self._before)
        order = torch.randperm(len(self.inputs), generator=self._generator)
        for index in order.to(self.inputs.device).split(self.batch_size)[self._taken :]:
            self._taken += 1
            yield self.inputs[index], self.targets[index]

    def state_dict(self) -> dict[str, Any]:
        """Where in the orders this is."""
        return {"before": self._before, "taken": self._taken, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self._before, self._taken = state["before"].cpu(), state["taken"]
        self._generator.set_state(state["generator"].cpu())
