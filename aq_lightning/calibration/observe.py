"""What is known of a site before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from aq_lightning import distributed
from aq_lightning.calibration.attach import AttachedBlock, site_shape, weights
from aq_lightning.experts import hooked
from aq_lightning.models.sites import Site, SiteShape
from aq_lightning.transforms import SiteStatistics


class ChannelRange:
    """Running least, greatest, mean and mean absolute value of each channel over all tokens seen; float64 on the data's
    device."""

    def __init__(self) -> None:
        self.low: Tensor | None = None  # (channels)
        self.high: Tensor | None = None  # (channels)
        self.total: Tensor | None = None  # (channels)
        self.size: Tensor | None = None  # (channels)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Takes in (…, channels)."""
        flat = x.detach().flatten(0, -2)  # (tokens, channels)
        low, high, total = flat.amin(0).double(), flat.amax(0).double(), flat.sum(0, dtype=torch.float64)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.total = total if self.total is None else self.total + total
        size = flat.abs().sum(0, dtype=torch.float64)
        self.size = size if self.size is None else self.size + size
        self.tokens += flat.shape[0]

    def share(self, like: Tensor) -> None:
        """Takes in what all other processes have seen; ``like``, (channels), stands for what this one may not have."""
        if distributed.ranks() == 1:
            return
        none = torch.zeros_like(like)
        low, high = (none + torch.inf, none - torch.inf) if self.low is None else (self.low, self.high)
        self.low, self.high = distributed.least(low), distributed.greatest(high)
        self.total, self.size = (none.clone() if each is None else each for each in (self.total, self.size))
        tokens = none.new_tensor(self.tokens)
        distributed.add_up([self.total, self.size, tokens])
        self.tokens = int(tokens)


Ranges = Mapping[str, Sequence[ChannelRange]]
"""What was seen at each site of a block: one range, or one for each expert of the tokens routed to it."""


@contextmanager
def observed(blocks: Sequence[nn.Module], sites: Sequence[Site]) -> Iterator[list[Ranges]]:
    """While it is open, the activations at every site with consumers are recorded, block by block; what all processes
    have seen is known when it closes."""
    ranges: list[Ranges] = []
    with ExitStack() as hooks:
        for block in blocks:
            ranges.append({})
            for site in (site for site in sites if site.consumers):
                ranges[-1][site.name] = hooks.enter_context(_watched(block, site))
        yield ranges
    for seen in (seen for sites_of_block in ranges for seen in sites_of_block.values()):
        known = next(each.total for each in seen if each.total is not None)  # every token reaches some expert
        for each in seen:
            each.share(known)


@contextmanager
def _watched(block: nn.Module, site: Site) -> Iterator[Sequence[ChannelRange]]:
    """While it is open, the activations at one site are recorded."""
    if site.per_expert:
        seen = [ChannelRange() for _ in block.get_parameter(site.consumers[0])]

        def look(expert: int, inner: Tensor) -> Tensor:
            seen[expert].update(inner)
            return inner

        with hooked(block.get_submodule(site.consumers[0].rpartition(".")[0]), look):
            yield seen
    else:
        seen = [ChannelRange()]
        reader = block.get_submodule(site.consumers[0])
        with reader.register_forward_pre_hook(lambda _, inputs: seen[0].update(inputs[0])):
            yield seen


def initialize(attached: AttachedBlock, ranges: Ranges) -> None:
    """Starts every transform of a block from the activations observed and from the weights that are quantized."""
    quantized = weights(attached.block)
    for site in attached.architecture.sites:
        if site.name in attached.transforms and site.consumers:
            members = [attached.architecture.member(name, attached.heads) for name in site.consumers]
            columns = [site.columns(quantized[member.weight]) for member in members if member.weight in quantized]
            greatest = torch.stack([c.abs().flatten(0, -2).amax(0).double() for c in columns]).amax(0)  # (channels)
            shape = site_shape(attached.block, site, attached.heads)
            attached.transforms[site.name].initialize(_statistics(shape, ranges[site.name], greatest))


def _statistics(shape: SiteShape, seen: Sequence[ChannelRange], greatest: Tensor) -> SiteStatistics:
    """Reduces over the query group: each argument (channels) → (blocks, size).

    An expert that no token reached counts as seen with activations from −1 to 1: its weights alone decide.
    """
    unit = torch.ones_like(greatest[: len(greatest) // len(seen)])  # (channels of an expert)
    low = torch.cat([one.low if one.tokens else -unit for one in seen])  # (channels), like all below
    high = torch.cat([one.high if one.tokens else unit for one in seen])
    mean = torch.cat([one.total / one.tokens if one.tokens else 0 * unit for one in seen])
    magnitude = torch.cat([one.size / one.tokens if one.tokens else unit for one in seen])
    return SiteStatistics(
        low=shape.split(low).amin(1),
        high=shape.split(high).amax(1),
        mean=shape.split(mean).mean(1),
        magnitude=shape.split(magnitude).mean(1),
        weight_max=shape.split(greatest).amax(1),
    )
