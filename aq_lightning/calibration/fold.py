"""Moving the transforms of a block into its weights: one pure function for training, merge and export."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from aq_lightning.models.sites import Architecture, Heads, Member, Site
from aq_lightning.transforms import Map

Tensors = Mapping[str, Tensor]


def fold(
    tensors: Tensors, architecture: Architecture, heads: Heads, maps: Mapping[str, Map], moved: Collection[str]
) -> dict[str, Tensor]:
    """Folds every map into the tensors around its site, but for the online part of its inverse, which has tensors of
    its own; biases of shifts follow in :func:`add_shift_biases`.

    Args:
        tensors: a block's parameters by name, all in one dtype.
        architecture: its sites, producers before consumers, and where their members lie.
        heads: of the model.
        maps: site name → its map; sites without one are left alone.
        moved: names of the sites whose producer really subtracts the shift.

    Returns:
        New tensors; those that no site touches are the given ones.
    """
    folded = dict(tensors)
    for site in (site for site in architecture.sites if site.name in maps):
        each, offset = maps[site.name], architecture.gain_offset
        producer = architecture.member(site.producer, heads)
        _over_outputs(
            folded,
            producer,
            each.inverse if each.folded is None else each.folded,
            offset,
            each.shift if site.name in moved else None,
        )
        if site.dual:
            _over_outputs(folded, architecture.member(site.dual, heads), each.transpose, offset)
        for consumer in site.consumers:
            name = architecture.member(consumer, heads).weight
            folded[name] = site.from_columns(each.transpose(site.columns(folded[name])), folded[name])
    return folded


def add_shift_biases(
    folded: Tensors, rounded: Tensors, sites: Iterable[Site], maps: Mapping[str, Map], moved: Collection[str]
) -> dict[str, Tensor]:
    """Biases that make every shift exact.

    Where the producer subtracts δ, consumers gain ``W' δ A⁻¹``. Elsewhere only the rounding error meets δ:
    they gain ``(W' − Ŵ') δ A⁻¹``.

    Args:
        folded: result of :func:`fold`.
        rounded: the same tensors with the weights fake-quantized.
        sites, maps, moved: as in :func:`fold`.

    Returns:
        ``rounded`` with the biases in place.
    """
    result = dict(rounded)
    for site in (site for site in sites if site.name in maps and maps[site.name].shift is not None):
        each = maps[site.name]
        for consumer in site.consumers:
            weight = folded[f"{consumer}.weight"]  # (out, in)
            acting = weight if site.name in moved else weight - rounded[f"{consumer}.weight"]
            gain = acting @ each.inverse(each.shift(weight.shape[1]))
            bias = f"{consumer}.bias"
            result[bias] = result[bias] + gain if bias in result else gain
    return result


def _over_outputs(
    tensors: dict[str, Tensor],
    member: Member,
    direction: Callable[[Tensor], Tensor],
    gain_offset: float,
    shift: Callable[[int], Tensor] | None = None,
) -> None:
    """Applies a map to what a norm's gain (channels) or a linear's weight (out, in) produces, and to its bias."""
    weight = tensors[member.weight]
    own = member.read(weight)
    changed = direction(own + gain_offset) - gain_offset if own.ndim == 1 else direction(own.T).T
    tensors[member.weight] = member.write(weight, changed)
    if shift is None and member.bias not in tensors:
        return
    bias = tensors.get(member.bias, weight.new_zeros(weight.shape[0]))
    own = member.read(bias)
    if shift is not None:
        own = own - shift(own.shape[0])
    tensors[member.bias] = member.write(bias, direction(own))
