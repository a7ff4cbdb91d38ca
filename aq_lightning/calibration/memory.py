"""Memory: its peak, for reports, and what is looked at to free it."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement on a GPU; the host's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.init()  # or there is nothing to reset yet, which is an error
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU allocator's peak since the reset, or on the CPU the process's greatest resident set so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def garbage_kept() -> Iterator[None]:
    """While it is open, the garbage collector passes over what is there now, libraries' objects above all: looking
    through these takes a third of a second, and is done behind every window of blocks."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
