"""Moving the transforms of a block into its weights: one pure function for training, merge and export."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from aq_lightning.models.sites import Architecture, Heads, Member, Site
from aq_lightning.transforms import Map

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scaled:
    """A weight ``diag(rows) · value · diag(columns)`` whose scales are kept apart, for who multiplies and rounds at
    once."""

    value: Tensor
    """(out, in)."""
    rows: Tensor | None = None
    """(out); None: ones."""
    columns: Tensor | None = None
    """(in); None: ones."""

    def read_through(self, each: Map) -> Scaled:
        """The weight of a linear that reads what ``each`` transforms."""
        if each.diagonal:
            ones = self.value.new_ones(self.value.shape[1]) if self.columns is None else self.columns
            return Scaled(self.value, self.rows, each.transpose(ones))
        value = self.value if self.columns is None else self.value * self.columns
        return Scaled(each.transpose(value), self.rows)

    def written_through(self, member: Member, direction: Callable[[Tensor], Tensor], diagonal: bool) -> Scaled:
        """The weight of a linear whose outputs, or those of one part of it, are transformed."""
        if diagonal:
            ones = self.value.new_ones(self.value.shape[0]) if self.rows is None else self.rows
            return Scaled(self.value, member.write(ones, direction(member.read(ones))), self.columns)
        value = self.value if self.rows is None else self.value * self.rows[:, None]
        return Scaled(member.write(value, direction(member.read(value).T).T), None, self.columns)


def fold(
    tensors: Tensors,
    architecture: Architecture,
    heads: Heads,
    maps: Mapping[str, Map],
    moved: Collection[str],
    kept: Collection[str] = (),
) -> dict[str, Tensor | Scaled]:
    """Folds every map into the tensors around its site, but for the online part of its inverse, which has tensors of
    its own; biases of shifts follow: see :func:`shift_directions`.

    Args:
        tensors: a block's parameters by name, all in one dtype.
        architecture: its sites, producers before consumers, and where their members lie.
        heads: of the model.
        maps: site name → its map; sites without one are left alone.
        moved: names of the sites whose producer really subtracts the shift.
        kept: weights (out, in) of linears whose scales are to be kept apart.

    Returns:
        New tensors; those that no site touches are the given ones.
    """
    folded = {name: Scaled(tensor) if name in kept else tensor for name, tensor in tensors.items()}
    for site in (site for site in architecture.sites if site.name in maps):
        each, offset = maps[site.name], architecture.gain_offset
        producer = architecture.member(site.producer, heads)
        outward = each if each.folded is None else each._replace(inverse=each.folded)
        _over_outputs(folded, producer, outward, outward.inverse, offset, site.name in moved)
        if site.dual:
            dual = each.transpose if each.folded_transpose is None else each.folded_transpose
            _over_outputs(folded, architecture.member(site.dual, heads), each, dual, offset)
        for consumer in site.consumers:
            name = architecture.member(consumer, heads).weight
            weight = folded[name]
            folded[name] = (
                weight.read_through(each)
                if isinstance(weight, Scaled)
                else site.from_columns(each.transpose(site.columns(weight)), weight)
            )
    return folded


def shift_directions(
    tensors: Mapping[str, Tensor | Scaled], sites: Iterable[Site], maps: Mapping[str, Map], moved: Collection[str]
) -> dict[str, tuple[Tensor, bool]]:
    """What makes every shift exact: weights of consumers by name → ``δ A⁻¹``, and whether the weight itself meets it.

    Where the producer subtracts δ, a consumer's bias gains ``W' δ A⁻¹``. Elsewhere only the rounding error meets δ: it
    gains ``(W' − Ŵ') δ A⁻¹``. :func:`add_biases` adds both.
    """
    directions = {}
    for site in (site for site in sites if site.name in maps and maps[site.name].shift is not None):
        each = maps[site.name]
        for name in (f"{consumer}.weight" for consumer in site.consumers):
            weight = tensors[name].value if isinstance(tensors[name], Scaled) else tensors[name]
            directions[name] = each.inverse(each.shift(weight.shape[1])), site.name in moved
    return directions


def add_shift_biases(
    folded: Tensors, rounded: Tensors, sites: Iterable[Site], maps: Mapping[str, Map], moved: Collection[str]
) -> dict[str, Tensor]:
    """``rounded``, the tensors of :func:`fold` with some weights rounded, with the biases of all shifts in place."""
    directions = shift_directions(folded, sites, maps, moved)
    gains = {
        name: (folded[name] if whole else folded[name] - rounded[name]) @ direction
        for name, (direction, whole) in directions.items()
    }
    return add_biases(rounded, gains)


def add_biases(tensors: Tensors, gains: Tensors) -> dict[str, Tensor]:
    """Adds gains, named after weights, to the biases beside these, which appear where there was none."""
    result = dict(tensors)
    for name, gain in gains.items():
        bias = f"{name.removesuffix('weight')}bias"
        result[bias] = result[bias] + gain if bias in result else gain
    return result


def _over_outputs(
    tensors: dict[str, Tensor | Scaled],
    member: Member,
    each: Map,
    direction: Callable[[Tensor], Tensor],
    gain_offset: float,
    shifted: bool = False,
) -> None:
    """Applies a map to what a norm's gain (channels) or a linear's weight (out, in) produces, and to its bias."""
    weight = tensors[member.weight]
    if isinstance(weight, Scaled):
        tensors[member.weight] = weight.written_through(member, direction, each.diagonal)
        weight = weight.value
    else:
        own = member.read(weight)
        changed = direction(own + gain_offset) - gain_offset if own.ndim == 1 else direction(own.T).T
        tensors[member.weight] = member.write(weight, changed)
    shift = each.shift if shifted else None
    if shift is None and member.bias not in tensors:
        return
    bias = tensors.get(member.bias, weight.new_zeros(weight.shape[0]))
    own = member.read(bias)
    if shift is not None:
        own = own - shift(own.shape[0])
    tensors[member.bias] = member.write(bias, direction(own))
