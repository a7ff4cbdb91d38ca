"""Round-to-nearest of a whole model, for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from aq_lightning.calibration.attach import attach, install, merge
from aq_lightning.models.sites import Architecture, Heads
from aq_lightning.quantizers import MinMax
from aq_lightning.scheme import Scheme


@contextmanager
def rounded_to_nearest(
    blocks: Iterable[nn.Module], architecture: Architecture, heads: Heads, scheme: Scheme, storage: torch.dtype
) -> Iterator[None]:
    """While it is open, every linear of the blocks holds its min–max rounded weight; the originals return after."""
    originals = []
    for block in blocks:
        originals.append((block, dict(block.named_parameters())))
        merge(attach(block, architecture, heads, {}, MinMax, scheme, storage), storage)
    try:
        yield
    finally:
        for block, tensors in originals:
            install(block, tensors)
