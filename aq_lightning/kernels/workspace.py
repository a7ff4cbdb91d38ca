"""Where blocks leave sums that others add up, and counters for that: zero before and after every launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIZE = 1 << 20  # counters of a device, 4 MiB
_TOGETHER = 4  # counters: every launch's begin at a multiple of 16 bytes, for which kernels are compiled


class _Ring:
    """Launches take what follows in one tensor, so that those in flight on several streams share no counter."""

    def __init__(self, device: torch.device) -> None:
        self._counters = torch.zeros(_SIZE, dtype=torch.int32, device=device)
        self._place = 0

    def take(self, number: int) -> Tensor:
        begin = self._place if self._place + number <= _SIZE else 0
        self._place = begin + -(-number // _TOGETHER) * _TOGETHER
        return self._counters[begin : begin + number]


@triton.jit
def last_of(counter, splits):
    """Whether this block is the last of ``splits`` to come here; the counter is 0 again after that."""
    tl.debug_barrier()  # every thread's stores come before the count
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1
    tl.store(counter, 0, mask=last)
    return last


_RINGS: dict[torch.device, _Ring] = {}


def counters(device: torch.device, number: int) -> Tensor:
    """int32 (number), zeros; whoever counts with them leaves zeros.

    While a CUDA graph is captured, a device without counters yet gets some that belong to the graph, since nothing may
    rely on a tensor that is only filled when the graph runs.
    """
    ring = _RINGS.get(device)
    if number > _SIZE or (ring is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(number, dtype=torch.int32, device=device)
    if ring is None:
        ring = _RINGS[device] = _Ring(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # zero before any other stream looks
    return ring.take(number)


class Workspace:
    """What blocks need that share a tile of the answer.

    Args:
        grid: blocks over tokens, over rows, and those that share a tile.
        size: numbers of a tile.
    """

    def __init__(self, grid: tuple[int, int, int], size: int) -> None:
        self._tiles, self._shared = grid[0] * grid[1], grid[2] > 1
        self._sums = self._tiles * grid[2] * size

    def take(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Room for all sums, float32, and a counter of each tile, for one launch; None where no blocks share."""
        if not self._shared:
            return None, None
        return torch.empty(self._sums, dtype=torch.float32, device=device), counters(device, self._tiles)
