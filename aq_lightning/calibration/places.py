"""Where a factor may act: what its site absorbs, and which module carries it if it is online."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Architecture, Heads, Site, SiteShape
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Factor, StaticCache


def carrier_of(block: nn.Module, architecture: Architecture, site: Site) -> str:
    """The module that carries a site's online products, so that each token meets them once.

    A norm does: all that read it are consumers, or nothing would fold there. Behind a linear the one consumer does,
    between queries and keys attention.

    Raises:
        RequestError: attention has no place for it, or several linears read what no norm produces.
    """
    if site.dual and not architecture.attention:
        raise RequestError(
            f"Online at {site.name} a matrix acts behind rotary embedding, and transformers lets no function be named "
            f"for this model's attention: remove it from transforms.{site.name}."
        )
    if site.dual:
        return architecture.attention
    if site.per_expert:
        raise RequestError(
            f"An online factor multiplies what one module reads, and every expert reads its own at {site.name}: "
            f"remove it from transforms.{site.name}."
        )
    producer = site.producer.partition(":")[0]
    if not isinstance(block.get_submodule(producer), nn.Linear):
        return producer
    if len(site.consumers) > 1:
        raise RequestError(
            f"Behind a linear an online factor has one consumer, got {', '.join(site.consumers)} at {site.name}: "
            f"remove it from transforms.{site.name}."
        )
    return site.consumers[0]


def check_place(block: nn.Module, architecture: Architecture, site: Site, factor: Factor) -> None:
    """
    Raises:
        RequestError: the site does not absorb the factor, which is not online, or see :func:`carrier_of`.
    """
    name = type(factor).__name__
    if factor.online:
        carrier_of(block, architecture, site)
        if bool(site.dual) != factor.operation().on_heads:
            raise RequestError(f"Online at {site.name} ({site.producer} ↔ {site.dual}) is one matrix per head, got "
                               f"{name}: use Dense, or remove it from transforms.{site.name}.")  # fmt: skip
        readers = [each for each in site.consumers if each not in architecture.experts]
        routers = [each for each in readers if not isinstance(block.get_submodule(each), nn.Linear)]
        if factor.rounds and routers:
            raise RequestError(f"A router reads unrounded activations, got {name} where {routers[0]} reads: remove it "
                               f"from transforms.{site.name}.")  # fmt: skip
    elif factor.group not in site.absorbs:
        folds = " or ".join(sorted(group.value for group in site.absorbs))
        raise RequestError(
            f"Only {folds} folds at {site.name} ({site.producer} → {', '.join(site.consumers) or site.dual}), got "
            f"{name}, which is {factor.group.value}: remove it from transforms.{site.name}"
            f"{_price(block, architecture, site, factor)}."
        )


def check_cache(architecture: Architecture, heads: Heads, scheme: Scheme) -> None:
    """
    Raises:
        RequestError: the model's attention has no place where keys and values could be rounded, or a run of channels
            does not divide a head.
    """
    if scheme.key_value is None:
        return
    if not architecture.attention:
        raise RequestError(
            f"Keys and values are rounded where a function is named for attention, got {scheme} for a model whose "
            "attention transformers lets no function be named for: choose a scheme without kv."
        )
    size = scheme.key_value.group_size
    if size is not None and heads.size % size:
        raise RequestError(
            f"A run of channels of keys and values divides a head of {heads.size}, got {size} in {scheme}: leave out x."
        )


def static_cache(sites: Iterable[Site], heads: Heads, scheme: Scheme, storage: torch.dtype) -> dict[str, Factor]:
    """The factor that a scheme adds behind those of the recipe, by site; :func:`check_cache` has passed."""
    if not scheme.static_cache:
        return {}
    shape = SiteShape(heads.key_value, heads.size, dual=True)
    return {site.name: StaticCache(shape, scheme.key_value, storage) for site in sites if site.dual}


def check_rounded(site: Site, factor: Factor, scheme: Scheme) -> None:
    """
    Raises:
        RequestError: a part of rounding activations that are not rounded, or an online matrix for keys that are not.
    """
    if factor.online and site.dual and scheme.key_value is None:
        raise RequestError(
            f"Online at {site.name} {type(factor).__name__} serves rounded keys, got scheme {scheme} without any: "
            f"choose one with kv, or remove it from transforms.{site.name}."
        )
    if factor.rounds and site.dual and scheme.static_cache:
        raise RequestError(
            f"{type(factor).__name__} looks at each token, got scheme {scheme}, whose scales of keys and values are "
            f"static, and learnt anyway: remove it from transforms.{site.name}."
        )
    if factor.rounds and not site.dual and scheme.activation is None:
        raise RequestError(
            f"{type(factor).__name__} is a part of rounding activations, got scheme {scheme}, which leaves them "
            f"alone: remove it from transforms.{site.name}."
        )


def _price(block: nn.Module, architecture: Architecture, site: Site, factor: Factor) -> str:
    """What it would cost to have the factor online, where that is possible."""
    operation = factor.operation()
    if operation is None or not site.consumers or site.per_expert:
        return ""
    multiply_adds = operation.multiply_adds(block.get_submodule(carrier_of(block, architecture, site)).weight.shape[-1])
    numbers = sum(tensor.numel() for tensor in operation.parameters())
    return (
        f", or declare it online (init_args: {{online: true}}), for {multiply_adds:,} multiply–adds per token and "
        f"{numbers:,} numbers more in each block"
    )
