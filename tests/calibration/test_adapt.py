"""Cutting a recipe to an architecture: what folds stays, what folds elsewhere is named, mistakes are refused."""

from __future__ import annotations

import pytest
import torch
from tiny import MODELS, tiny

from aq_lightning.calibration import adapt, attach
from aq_lightning.errors import RequestError
from aq_lightning.quantizers import MinMax
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


def test_what_folds_elsewhere_is_named() -> None:
    model = tiny("qwen3")
    wishes = {"query_key": [RopePair, PairScale], "mlp_input": [Shift]}
    folding, refusals = adapt(model.blocks[0], model.architecture, model.heads, wishes, Scheme.parse("w4a16"))
    assert folding == {"query_key": [PairScale]} and len(refusals) == 2
    assert "RopePair" in refusals[0] and "mlp_input needs a bias" in refusals[1]
