"""What is known of a site before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from aq_lightning.calibration.attach import AttachedBlock, site_shape
from aq_lightning.models.sites import Site, SiteShape
from aq_lightning.transforms import SiteStatistics


class ChannelRange:
    """Running least, greatest and mean value of each channel over all tokens seen; float64 on the data's device."""

    def __init__(self) -> None:
        self.low: Tensor | None = None  # (channels)
        self.high: Tensor | None = None  # (channels)
        self.total: Tensor | None = None  # (channels)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Takes in (…, channels)."""
        flat = x.detach().flatten(0, -2)  # (tokens, channels)
        low, high, total = flat.amin(0).double(), flat.amax(0).double(), flat.sum(0, dtype=torch.float64)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.total = total if self.total is None else self.total + total
        self.tokens += flat.shape[0]


Ranges = Mapping[str, ChannelRange]
"""What was seen at each site of a block."""


@contextmanager
def observed(blocks: Sequence[nn.Module], sites: Sequence[Site]) -> Iterator[list[Ranges]]:
    """While it is open, the activations at every site with consumers are recorded, block by block."""
    ranges: list[Ranges] = [{site.name: ChannelRange() for site in sites if site.consumers} for _ in blocks]
    with ExitStack() as hooks:
        for block, seen in zip(blocks, ranges, strict=True):
            for site in (site for site in sites if site.consumers):
                handle = block.get_submodule(site.consumers[0]).register_forward_pre_hook(
                    lambda _, inputs, at=seen[site.name]: at.update(inputs[0])
                )
                hooks.callback(handle.remove)
        yield ranges


def initialize(attached: AttachedBlock, ranges: Ranges) -> None:
    """Starts every transform of a block from the activations observed and from its consumers' weights."""
    for site in attached.architecture.sites:
        if site.name in attached.transforms and site.consumers:
            weights = [attached.block.get_submodule(name).weight for name in site.consumers]
            greatest = torch.stack([weight.abs().amax(0).double() for weight in weights]).amax(0)  # (channels)
            shape = site_shape(attached.block, site, attached.heads)
            attached.transforms[site.name].initialize(_statistics(shape, ranges[site.name], greatest))


def _statistics(shape: SiteShape, seen: ChannelRange, greatest: Tensor) -> SiteStatistics:
    """Reduces over the query group: each argument (channels) → (blocks, size)."""
    return SiteStatistics(
        low=shape.split(seen.low).amin(1),
        high=shape.split(seen.high).amax(1),
        mean=shape.split(seen.total / seen.tokens).mean(1),
        weight_max=shape.split(greatest).amax(1),
    )
