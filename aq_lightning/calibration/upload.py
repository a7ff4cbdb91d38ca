"""Samples of streams in host memory on their way to a GPU, beside its work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Order = TypeVar("Order")
Work = TypeVar("Work")


def one_ahead(
    orders: Iterable[Order], start: Callable[[Order], Work], finish: Callable[[Work], Work]
) -> Iterator[Work]:
    """Works in order; each is started before the one ahead of it is handed out, and finished before it is itself."""
    begun: list[Work] = []
    for order in orders:
        begun.append(start(order))
        if len(begun) > 1:
            yield finish(begun.pop(0))
    yield from map(finish, begun)


class Upload:
    """Copies samples to a GPU in a queue of its own.

    Args:
        device: the GPU. The copies overlap with its work if the samples lie in pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._queue = device, torch.cuda.Stream(device)

    def start(self, stream: Tensor, places: list[int]) -> Tensor:
        """Samples ``places`` of a stream, (samples, length, hidden) → (places, length, hidden); to be finished."""
        with torch.cuda.stream(self._queue):
            copy = torch.empty(len(places), *stream.shape[1:], dtype=stream.dtype, device=self.device)
            for row, place in zip(copy, places, strict=True):
                row.copy_(stream[place], non_blocking=True)
        return copy

    def finish(self, *copies: Tensor) -> None:
        """What is asked of the device from now on finds the copies there."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._queue)
        for copy in copies:
            copy.record_stream(current)  # its memory is not given away before that work is done
