"""Shuffled batches of a window's inputs and targets, which can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aq_lightning.calibration.upload import Upload, one_ahead


@dataclass(frozen=True)
class Share:
    """Which samples one of several processes keeps, such that batches do not depend on how many processes there are.

    The samples are dealt out to as many strata as a batch has places, and a batch takes one of each. A stratum belongs
    to one process for good. The last batch of an epoch may lack some.
    """

    samples: int
    """Of all processes."""
    batch_size: int
    """Samples of a whole batch, of all processes: no fewer than processes."""
    rank: int = 0
    """Number of this process."""
    ranks: int = 1
    """Processes."""

    def indices(self) -> Tensor:
        """This process's samples among all, int64, ascending."""
        every = torch.arange(self.samples)
        return every[every % self.batch_size % self.ranks == self.rank]

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, int]]:
        """An epoch in random order: places among :meth:`indices`, and how many samples all processes take together."""
        own = self.indices()
        rows = -(-self.samples // self.batch_size)
        order = torch.full((rows, self.batch_size), self.samples)  # (batches, strata); what lies behind is absent
        for stratum in range(min(self.batch_size, self.samples)):
            size = -(-(self.samples - stratum) // self.batch_size)
            drawn = torch.randperm(size, generator=generator)
            order[:size, stratum] = stratum + self.batch_size * drawn
        for row in order:
            present = row[row < self.samples]
            yield torch.searchsorted(own, present[present % self.batch_size % self.ranks == self.rank]), len(present)


class Batch(NamedTuple):
    """What a step reads."""

    inputs: Tensor
    """(batch, length, hidden); no sample at all where other processes have the last ones."""
    targets: Tensor
    """The same shape."""
    total: int
    """Samples of all processes."""


class Pairs:
    """Batches of inputs and targets, in another order every epoch; the same seed gives the same orders.

    A Trainer keeps :meth:`state_dict` in its checkpoints, and goes on behind the last batch that it took.

    Args:
        inputs: (samples, length, hidden).
        targets: same shape.
        batch_size: samples in a batch of all processes; the last may hold fewer.
        seed: of the orders, the same for all processes.
        share: which samples these are; None: all.
        device: where batches are read: from streams in host memory the next is on its way there while one is at work;
            None: where the streams are.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        seed: int,
        share: Share | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.inputs, self.targets = inputs, targets
        self.share = share or Share(len(inputs), batch_size)
        away = device is not None and device.type == "cuda" and inputs.device.type == "cpu"
        self._upload = Upload(device) if away else None
        self._generator = torch.Generator().manual_seed(seed)
        self._before = self._generator.get_state()  # what the order of this epoch was drawn from
        self._taken = len(self)  # batches of this epoch

    def __len__(self) -> int:
        return -(-self.share.samples // self.share.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._taken == len(self):
            self._before, self._taken = self._generator.get_state(), 0
        self._generator.set_state(self._before)
        order = list(self.share.batches(self._generator))[self._taken :]
        if self._upload is None:
            batches = (Batch(_samples(self.inputs, own), _samples(self.targets, own), total) for own, total in order)
        else:
            batches = one_ahead(order, self._start, self._finish)
        for batch in batches:
            self._taken += 1
            yield batch

    def _start(self, drawn: tuple[Tensor, int]) -> Batch:
        places = drawn[0].tolist()
        return Batch(self._upload.start(self.inputs, places), self._upload.start(self.targets, places), drawn[1])

    def _finish(self, batch: Batch) -> Batch:
        self._upload.finish(batch.inputs, batch.targets)
        return batch

    def let_go(self) -> None:
        """Holds no streams any longer: a Trainer's loops refer to it and to themselves, and are found late."""
        self.inputs = self.targets = self.inputs[:0].clone()

    def state_dict(self) -> dict[str, Any]:
        """Where in the orders this is."""
        return {"before": self._before, "taken": self._taken, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self._before, self._taken = state["before"].cpu(), state["taken"]
        self._generator.set_state(state["generator"].cpu())


def _samples(stream: Tensor, places: Tensor) -> Tensor:
    """Samples of a stream; one alone is not copied. A GPU copies whole samples, and gathers numbers by a tensor."""
    places = places.tolist()
    if len(places) <= 1:
        return stream[places[0] : places[0] + 1] if places else stream[:0]
    return torch.stack([stream[place] for place in places])
