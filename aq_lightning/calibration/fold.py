"""Moving the transforms of a block into its weights: one pure function for training, merge and export."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from aq_lightning.models.sites import Site
from aq_lightning.transforms import Map

Tensors = Mapping[str, Tensor]


def fold(tensors: Tensors, sites: Iterable[Site], maps: Mapping[str, Map], moved: Collection[str]) -> dict[str, Tensor]:
    """Folds every map into the tensors around its site; biases of shifts follow in :func:`add_shift_biases`.

    Args:
        tensors: a block's parameters by name, all in one dtype.
        sites: the architecture's sites, producers before consumers.
        maps: site name → its map; sites without one are left alone.
        moved: names of the sites whose producer really subtracts the shift.

    Returns:
        New tensors; those that no site touches are the given ones.
    """
    folded = dict(tensors)
    for site in (site for site in sites if site.name in maps):
        each = maps[site.name]
        weight, bias = f"{site.producer}.weight", f"{site.producer}.bias"
        folded[weight] = _over_outputs(folded[weight], each.inverse)
        if site.name in moved:
            shift = each.shift(folded[weight].shape[0])
            folded[bias] = folded[bias] - shift if bias in folded else -shift
        if bias in folded:
            folded[bias] = each.inverse(folded[bias])
        if site.dual:
            weight, bias = f"{site.dual}.weight", f"{site.dual}.bias"
            folded[weight] = _over_outputs(folded[weight], each.transpose)
            if bias in folded:
                folded[bias] = each.transpose(folded[bias])
        for consumer in site.consumers:
            folded[f"{consumer}.weight"] = each.transpose(folded[f"{consumer}.weight"])
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


def _over_outputs(weight: Tensor, direction: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a map to what a norm's gain (channels) or a linear's weight (out, in) produces."""
    return direction(weight) if weight.ndim == 1 else direction(weight.T).T
