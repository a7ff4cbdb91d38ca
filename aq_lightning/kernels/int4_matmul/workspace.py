"""Counters for blocks that add up what others computed: zero before and after every launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

_SIZE = 1 << 20  # counters of a device, 4 MiB


@dataclass(frozen=True)
class _Ring:
    """Launches take turns through one tensor, so that those in flight on several streams share no counter."""

    tensor: Tensor
    turn: count = field(default_factory=count)

    def take(self, number: int) -> Tensor:
        pages = _SIZE // number
        place = next(self.turn) % pages
        return self.tensor[place * number : (place + 1) * number]


_RINGS: dict[torch.device, _Ring] = {}


def counters(device: torch.device, number: int) -> Tensor:
    """int32 (number), zeros; whoever counts with them leaves zeros.

    While a CUDA graph is captured, a device without counters yet gets some that belong to the graph, since nothing may
    rely on a tensor that is only filled when the graph runs.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if number > _SIZE or (capturing and device not in _RINGS):
        return torch.zeros(number, dtype=torch.int32, device=device)
    if device not in _RINGS:
        _RINGS[device] = _Ring(torch.zeros(_SIZE, dtype=torch.int32, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # zero before any other stream looks
    return _RINGS[device].take(number)
