"""Cutting a recipe to what folds in an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from aq_lightning.calibration.attach import attach
from aq_lightning.errors import RequestError
from aq_lightning.models.lookup import model_types, variants_of
from aq_lightning.models.sites import Architecture, Heads, SiteShape
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import FactorFactory

Transforms = Mapping[str, Sequence[FactorFactory]]


def adapt(
    block: nn.Module, architecture: Architecture, heads: Heads, transforms: Transforms, scheme: Scheme
) -> tuple[dict[str, list[FactorFactory]], list[str]]:
    """The factors that fold in a block, and for each of the others why it does not.

    Left out is only what folds in some other architecture; a site or a combination that none knows is a mistake.

    Args:
        block: one HF block, which may be on the meta device.
        architecture: its sites.
        heads: its attention heads.
        transforms: what is wished for, site by site.
        scheme: integers of weights and activations.

    Raises:
        RequestError: a factor at a site where no architecture absorbs it, or a site that none has; an online factor
            at a site that this architecture has.
    """
    folding: dict[str, list[FactorFactory]] = {}
    refusals: list[str] = []
    for site, factories in transforms.items():
        for factory in factories:
            try:
                attach(block, architecture, heads, {site: [factory]}, None, scheme, torch.float32).detach()
            except RequestError as refusal:
                if not _left_out(architecture, site, factory, scheme):
                    raise
                refusals.append(str(refusal))
            else:
                folding.setdefault(site, []).append(factory)
    return folding, refusals


def _left_out(architecture: Architecture, name: str, factory: FactorFactory, scheme: Scheme) -> bool:
    """Whether a refused factor fits elsewhere: some architecture has a site of this name that absorbs it.

    An online one does not ask what a site absorbs: where the site exists, something else is wrong with it, unless it
    belongs to rounding, which a scheme may not do, stands in attention, where some models have no place for it and some
    schemes no use, or inside experts, where each reads its own.
    """
    own = [site for site in architecture.sites if site.name == name]
    dual = bool(own and own[0].dual)
    factor = factory(SiteShape(1, 0, dual=dual))  # no channels: blocks of any width divide them
    if own and (factor.rounds or factor.online and own[0].per_expert):
        return True
    if factor.online and own:
        unused = not architecture.attention or scheme.key_value is None
        return dual and unused and factor.operation().on_heads
    sites = (site for kind in model_types() for variant in variants_of(kind) for site in variant.sites)
    return any(
        site.name == name and (bool(site.consumers) if factor.online else factor.group in site.absorbs)
        for site in sites
    )
