"""Where a factor may act: what its site absorbs, and which module carries it if it is online."""

from __future__ import annotations

from torch import nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Site
from aq_lightning.transforms import Factor


def carrier_of(block: nn.Module, site: Site) -> str:
    """The module that carries a site's online products, so that each token meets them once.

    A norm does: all that read it are consumers, or nothing would fold there. Behind a linear the one consumer does.

    Raises:
        RequestError: nothing reads what the site transforms, or several linears read what no norm produces.
    """
    if not site.consumers:
        raise RequestError(
            f"An online factor multiplies what linears read, and none reads {site.name} ({site.producer} ↔ "
            f"{site.dual}): remove it from transforms.{site.name}."
        )
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


def check_place(block: nn.Module, site: Site, factor: Factor) -> None:
    """
    Raises:
        RequestError: the site does not absorb the factor, which is not online, or see :func:`carrier_of`.
    """
    if factor.online:
        carrier_of(block, site)
    elif factor.group not in site.absorbs:
        folds = " or ".join(sorted(group.value for group in site.absorbs))
        raise RequestError(
            f"Only {folds} folds at {site.name} ({site.producer} → {', '.join(site.consumers) or site.dual}), got "
            f"{type(factor).__name__}, which is {factor.group.value}: remove it from transforms.{site.name}"
            f"{_price(block, site, factor)}."
        )


def _price(block: nn.Module, site: Site, factor: Factor) -> str:
    """What it would cost to have the factor online, where that is possible."""
    operation = factor.operation()
    if operation is None or not site.consumers or site.per_expert:
        return ""
    multiply_adds = operation.multiply_adds(block.get_submodule(carrier_of(block, site)).weight.shape[-1])
    numbers = sum(tensor.numel() for tensor in operation.parameters())
    return (
        f", or declare it online (init_args: {{online: true}}), for {multiply_adds:,} multiply–adds per token and "
        f"{numbers:,} numbers more in each block"
    )
