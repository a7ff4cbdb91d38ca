"""Memory: its peak, for reports, what is looked at to free it, and whether there is enough."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aq_lightning.errors import RequestError
from aq_lightning.models.pretrained import Pretrained


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


def check_memory(pretrained: Pretrained, device: torch.device, what: str, instead: str) -> None:
    """
    Args:
        pretrained: the model.
        device: where all of it is to be.
        what: is done with it, for the message.
        instead: what to do where that is too much.

    Raises:
        RequestError: the device cannot hold the model's weights as they are stored, and as much again as its blocks
            are worked on one at a time.
    """
    if device.type != "cuda":
        return
    needed = sum(each.numel() for each in pretrained.model.parameters()) * pretrained.storage.itemsize
    needed += 16 * max(sum(each.numel() for each in block.parameters()) for block in pretrained.blocks)
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise RequestError(
            f"{what} with all blocks on one device, got {free / 1e9:.0f} GB free on {device} of "
            f"{needed / 1e9:.0f} GB: take a larger GPU, or {instead}."
        )
