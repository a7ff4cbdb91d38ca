"""Choosing ranges and codes by what a block's weights read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.call import Arguments, BlockFunction
from aq_lightning.calibration.fold import add_shift_biases
from aq_lightning.calibration.read import MomentSums, looking, read_together
from aq_lightning.calibration.streams import Streams, run
from aq_lightning.models.sites import Site
from aq_lightning.qtensor import QTensor
from aq_lightning.rounders import Moments, Rounder

Codes = Mapping[str, QTensor]
"""Weights of a block that are rounded for good, by name."""


@dataclass(frozen=True)
class Passes:
    """How streams pass through a block."""

    arguments: Arguments
    """The block's other arguments, on the device."""
    batch_size: int
    """Samples per pass."""
    device: torch.device
    """The block's."""

    def run(self, block: BlockFunction, stream: Tensor) -> Tensor:
        """(samples, length, hidden) → a new stream."""
        return run([block], [self.arguments], stream, self.batch_size, self.device)


class FoldedBlock:
    """An attached block with its transforms folded in float64, whose weights are rounded one after the other.

    Args:
        attached: the block.
        passes: how streams pass through it.
    """

    @torch.no_grad()
    def __init__(self, attached: AttachedBlock, passes: Passes) -> None:
        self.attached = attached
        self.passes = passes
        self.folded, self.maps = attached.folded(torch.float64)
        self.quantizers = {key.replace("/", "."): quantizer for key, quantizer in attached.quantizers.items()}

    @torch.no_grad()
    def function(self, codes: Codes) -> BlockFunction:
        """The block with the weights in ``codes`` rounded and the others as they are."""
        attached, dtype = self.attached, next(self.attached.block.parameters()).dtype
        values = {name: each.dequantize(torch.float64).view_as(self.folded[name]) for name, each in codes.items()}
        sites, folded = attached.architecture.sites, self.folded
        values = add_shift_biases(folded, folded | values, sites, self.maps, attached.moved)
        tensors = {name: value.to(dtype) for name, value in values.items()}
        return lambda hidden, **others: functional_call(attached.block, tensors, (hidden,), others)

    def groups(self, stream: Tensor) -> list[list[str]]:
        """Weights that read the same, in the order of reading."""
        function = self.function({})
        return read_together(self.attached.block, self.quantizers, lambda: self.passes.run(function, stream[:1]))

    @torch.no_grad()
    def moments(
        self, names: Collection[str], codes: Codes, streams: Streams, asymmetric: bool = False
    ) -> dict[str, list[Moments]]:
        """Second moments of what each of ``names`` reads, expert by expert.

        Args:
            names: of weights.
            codes: those that are rounded already.
            streams: what enters the block.
            asymmetric: whether the full-precision stream is compared.
        """
        block, size = self.attached.block, self.passes.batch_size
        sums = {name: self._sums(name, asymmetric) for name in names}
        quantized, full = self.function(codes), self.function({})
        for start in range(0, len(streams.quantized), size):
            batch = slice(start, start + size)
            if asymmetric:
                with looking(block, names, lambda name, *seen: sums[name].look_full(*seen)):
                    self.passes.run(full, streams.full[batch])
            with looking(block, names, lambda name, *seen: sums[name].look(*seen)):
                self.passes.run(quantized, streams.quantized[batch])
        return {name: each.moments() for name, each in sums.items()}

    def _sums(self, name: str, asymmetric: bool) -> MomentSums:
        """For a weight; a shift that acts through biases alone meets what differs from it."""
        weight = self.folded[name]  # (out, in) or (experts, out, in)
        centre = weight.new_zeros(weight.shape[-1])
        for site in self.attached.architecture.sites:
            consumes = name.removesuffix(".weight") in site.consumers and site.name not in self.attached.moved
            if consumes and site.name in self.maps and self.maps[site.name].shift is not None:
                each = self.maps[site.name]
                centre = each.inverse(each.shift(weight.shape[-1]))
        return MomentSums(weight.shape[0] if weight.ndim == 3 else 1, centre, asymmetric)


@torch.no_grad()
def choose_scales(attached: AttachedBlock, passes: Passes, stream: Tensor) -> None:
    """Lets every factor that searches its start do so, site after site.

    The error of a site is the mean square of what rounding the weights of its consumers, to their whole ranges or as
    their quantizers start, does to their answers. (AWQ's release looks at the answer of attention as a whole instead.)

    Args:
        attached: the block.
        passes: how streams pass through it.
        stream: what enters it, (samples, length, hidden).
    """
    for site in (site for site in attached.architecture.sites if site.consumers):
        factors = attached.transforms[site.name].factors if site.name in attached.transforms else ()
        for factor in (each for each in factors if each.searches):
            factor.search(_site_error(attached, passes, stream, site))


@torch.no_grad()
def balance(attached: AttachedBlock, passes: Passes, stream: Tensor) -> None:
    """Lets every factor that starts from second moments do so, all from one pass.

    Args:
        attached: the block.
        passes: how streams pass through it.
        stream: what enters it, (samples, length, hidden).
    """
    factors = {
        site: [each for each in attached.transforms[site.name].factors if each.balances]
        for site in attached.architecture.sites
        if site.name in attached.transforms and site.consumers
    }
    if not any(factors.values()):
        return
    block = FoldedBlock(attached, passes)
    read = {
        site: [name for consumer in site.consumers if (name := _weight(attached, consumer)) in block.quantizers]
        for site, each in factors.items()
        if each
    }
    seen = block.moments([names[0] for names in read.values()], {}, Streams(stream, stream))
    for site, names in read.items():
        rows = torch.cat([block.folded[name].flatten(0, -2) for name in names])  # (outputs of all consumers, channels)
        second = torch.stack([each.second for each in seen[names[0]]]).sum(0)
        for factor in factors[site]:
            factor.balance(second, rows.mT @ rows)


def _weight(attached: AttachedBlock, consumer: str) -> str:
    return attached.architecture.member(consumer, attached.heads).weight


def _site_error(attached: AttachedBlock, passes: Passes, stream: Tensor, site: Site) -> Callable[[], float]:
    """The error of a site's consumers at whatever its transform is when it is called."""
    block = FoldedBlock(attached, passes)
    members = [_weight(attached, consumer) for consumer in site.consumers]
    read = {
        name: block.moments([name], {}, Streams(stream, stream))[name] for name in members if name in block.quantizers
    }
    before = block.maps[site.name]

    def error() -> float:
        folded, maps = attached.folded(torch.float64)
        total = 0.0
        for name, moments in read.items():
            off = folded[name] - block.quantizers[name](folded[name])  # (out, in) or (experts, out, in)
            columns = before.transpose(maps[site.name].inverse(site.columns(off)))  # in the coordinates of moments
            parts = site.from_columns(columns, off).flatten(0, -2).chunk(len(moments))
            total += sum(float(((part @ m.second) * part).sum()) for part, m in zip(parts, moments, strict=True))
        return total

    return error


@torch.no_grad()
def choose_ranges(attached: AttachedBlock, passes: Passes, stream: Tensor) -> None:
    """Lets every quantizer that searches its ranges do so, for the weights as they are folded now.

    Args:
        attached: the block.
        passes: how streams pass through it.
        stream: what enters it, (samples, length, hidden).
    """
    searches = [each.search for each in attached.quantizers.values() if each.search is not None]
    if not searches:
        return
    block, seen = FoldedBlock(attached, passes), {}
    if any(search.weighting != "none" for search in searches):
        groups = block.groups(stream)
        heads = block.moments([group[0] for group in groups], {}, Streams(stream, stream))
        seen = {name: [each.second for each in heads[group[0]]] for group in groups for name in group}
    for name, quantizer in block.quantizers.items():
        quantizer.initialize(block.folded[name], seen.get(name, []))


@torch.no_grad()
def rounded(attached: AttachedBlock, rounder: Rounder, passes: Passes, streams: Streams) -> dict[str, QTensor]:
    """A block's weights rounded by a rounder, in the order in which they are read: each sees what the block computes
    with those before it rounded (GPTQ's true-sequential form).

    Args:
        attached: the block after training.
        rounder: chooses the codes.
        passes: how streams pass through the block.
        streams: what enters it.

    Returns:
        Every quantized weight by name.
    """
    block, codes = FoldedBlock(attached, passes), {}
    for group in block.groups(streams.quantized):
        moments = block.moments(group[:1], codes, streams, rounder.asymmetric)[group[0]]
        for name in group:
            weight, quantizer = block.folded[name].flatten(0, -2), block.quantizers[name]
            if not list(quantizer.parameters()):  # nothing was trained for the ranges as they are
                quantizer = deepcopy(quantizer)
                quantizer.initialize(weight, [each.second for each in moments])
            start = quantizer.quantize(weight)
            parts = zip(weight.chunk(len(moments)), start.split(len(moments)), moments, strict=True)
            codes[name] = QTensor.joined([rounder.round(*part) for part in parts])
    return codes
