"""Cutting a recipe to an architecture: what folds stays, what folds elsewhere is named, mistakes are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import CONFIGS
from tiny import MODELS, tiny

from aq_lightning.calibration import adapt, attach
from aq_lightning.cli import CommandLine
from aq_lightning.errors import RequestError
from aq_lightning.quantizers import MinMax
from aq_lightning.recipe import Recipe
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Affine, Diagonal, PairScale, RopePair, Shift

WISHES = {
    "attention_input": [Shift, Diagonal],
    "query_key": [RopePair],
    "value_output": [Diagonal, Affine],
    "mlp_input": [Shift, Diagonal],
    "mlp_hidden": [Diagonal],
}


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_left_attaches_and_nothing_vanishes(name: str, scheme: str) -> None:
    model = tiny(name)
    place = (model.blocks[0], model.architecture, model.heads)
    folding, refusals = adapt(*place, WISHES, Scheme.parse(scheme))
    attach(*place, folding, MinMax, Scheme.parse(scheme), torch.float64)
    assert sum(map(len, folding.values())) + len(refusals) == sum(map(len, WISHES.values()))
    assert Affine in folding["value_output"], "the method's heart folds everywhere"
    if name == "llama":
        assert folding == WISHES and not refusals


@pytest.mark.parametrize(
    "wish", [{"atention_input": [Diagonal]}, {"attention_input": [Affine]}, {"mlp_hidden": [Shift]}]
)
def test_mistakes_are_refused(wish) -> None:
    model = tiny("qwen3")
    with pytest.raises(RequestError, match=next(iter(wish))):
        adapt(model.blocks[0], model.architecture, model.heads, wish, Scheme.parse("w4a16"))


ONLINE = partial(Affine, online=True)


def test_online_factors_are_left_out_only_where_the_site_does_not_exist() -> None:
    """A width that does not divide is a mistake, and so is a site that no linear reads."""
    for name, refused in (("llama", False), ("gpt_neox", True)):
        model = tiny(name)
        place = (model.blocks[0], model.architecture, model.heads)
        before = list(model.blocks[0].named_modules())
        wishes = {"attention_input": [Diagonal, ONLINE], "mlp_hidden": [partial(ONLINE, block=32)]}
        folding, refusals = adapt(*place, wishes, Scheme.parse("w4a16"))
        assert folding["attention_input"] == wishes["attention_input"] and len(refusals) == refused
        assert ("mlp_hidden" in folding) != refused
        assert list(model.blocks[0].named_modules()) == before, "checking leaves no trace"
        for wish, said in (
            ({"attention_input": [partial(ONLINE, block=48)]}, "must divide the 64 channels of its site, got 48"),
            ({"query_key": [ONLINE]}, "one matrix per head, got Affine"),
        ):
            with pytest.raises(RequestError, match=said):
                adapt(*place, wish, Scheme.parse("w4a16"))


def test_what_folds_elsewhere_is_named() -> None:
    model = tiny("qwen3")
    wishes = {"query_key": [RopePair, PairScale], "mlp_input": [Shift]}
    folding, refusals = adapt(model.blocks[0], model.architecture, model.heads, wishes, Scheme.parse("w4a16"))
    assert folding == {"query_key": [PairScale]} and len(refusals) == 2
    assert "RopePair" in refusals[0] and "mlp_input needs a bias" in refusals[1]


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    """Of every configuration with online factors."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CommandLine, "_run_subcommand", lambda self, subcommand: None)
        for config in ("affinequant-online", "flatquant", "quarot"):
            arguments = ["fit", f"--config={CONFIGS / config}.yaml", "--model.scheme=w4a4kv4"]
            found[config] = CommandLine(arguments).model.recipe
    return found


@pytest.mark.parametrize("name", MODELS)
def test_configurations_with_online_factors_fit_every_architecture(recipes: dict[str, Recipe], name: str) -> None:
    """What is left out belongs to sites that are not there, to attention without a place for it, or to experts."""
    model = tiny(name)
    sites = {site.name: site for site in model.architecture.sites}
    for recipe in recipes.values():
        scheme = recipe.scheme if model.architecture.attention else replace(recipe.scheme, key_value=None)
        folding, _ = adapt(model.blocks[0], model.architecture, model.heads, recipe.transforms, scheme)
        place = (model.blocks[0], model.architecture, model.heads)
        attach(*place, folding, recipe.weight_quantizer, scheme, torch.float32).detach()
        for at, factories in recipe.transforms.items():
            missing = at not in sites or at == "query_key" and not model.architecture.attention
            routed = bool(model.architecture.experts) and at in ("mlp_input", "mlp_hidden")
            assert missing == (at not in folding) or routed
            assert missing or routed or len(folding[at]) == len(factories)
    assert ("mlp_hidden" in folding) == (not model.architecture.experts and "mlp_hidden" in sites)
