"""Every preset is a method's values for a known model, and fits its blocks."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CONFIGS
from transformers import AutoConfig, PreTrainedConfig

from aq_lightning.calibration import adapt, attach
from aq_lightning.calibration.attach import linears
from aq_lightning.cli import CommandLine
from aq_lightning.errors import RequestError
from aq_lightning.language_model import QuantizedLanguageModel
from aq_lightning.models.loading import skeleton
from aq_lightning.models.lookup import architecture_of, heads_of
from aq_lightning.models.sites import SiteShape
from aq_lightning.transforms import Affine, Diagonal

PRESETS = sorted((CONFIGS / "presets").glob("*/*.yaml"))
SCHEMES = {"w4a16g128", "w3a16g128", "w2a16g128", "w4a4"}


def llama(hidden: int, inner: int, layers: int, heads: int, grouped: int, vocabulary: int = 32000) -> PreTrainedConfig:
    return decoder("llama", hidden, inner, layers, heads, grouped, vocabulary)


def decoder(kind: str, hidden: int, inner: int, layers: int, heads: int, grouped: int, vocabulary: int):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return AutoConfig.for_model(kind, **sizes, num_attention_heads=heads, num_key_value_heads=grouped)


def opt(hidden: int, layers: int, heads: int) -> PreTrainedConfig:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    return AutoConfig.for_model("opt", **sizes, num_hidden_layers=layers, num_attention_heads=heads)


SHAPES = {  # as published, and parameters in 1e9
    "opt-6.7b": (opt(4096, 32, 32), 6.7),
    "opt-30b": (opt(7168, 48, 56), 30.0),
    "llama-30b": (llama(6656, 17920, 60, 52, 52), 32.5),
    "llama-2-7b": (llama(4096, 11008, 32, 32, 32), 6.7),
    "llama-2-13b": (llama(5120, 13824, 40, 40, 40), 13.0),
    "llama-2-70b": (llama(8192, 28672, 80, 64, 8), 69.0),
    "llama-3-8b": (llama(4096, 14336, 32, 32, 8, 128256), 8.0),
    "llama-3-70b": (llama(8192, 28672, 80, 64, 8, 128256), 70.6),
    "qwen2.5-7b": (decoder("qwen2", 3584, 18944, 28, 28, 4, 152064), 7.6),
    "qwen2.5-32b": (decoder("qwen2", 5120, 27648, 64, 40, 8, 152064), 32.8),
}


def test_there_is_one_for_every_model_and_scheme() -> None:
    assert {(path.parent.name, path.stem) for path in PRESETS} == {(m, s) for m in SHAPES for s in SCHEMES}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_ones(name: str) -> None:
    config, billions = SHAPES[name]
    assert sum(parameter.numel() for parameter in skeleton(config).parameters()) / 1e9 == pytest.approx(
        billions, rel=0.02
    )


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_preset_fits_its_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed on top of the method, with every object built and attached to a block on the meta device."""
    monkeypatch.setattr(CommandLine, "_run_subcommand", lambda self, subcommand: None)
    cli = CommandLine(["fit", f"--config={CONFIGS / 'affinequant.yaml'}", f"--config={path}"])
    given, recipe = yaml.safe_load(path.read_text()), cli.model.recipe
    assert str(recipe.scheme) == path.stem == given["model"]["scheme"]
    assert cli.trainer.max_epochs == (40 if path.stem.startswith("w2") else 20)
    assert recipe.learning_rates.clipping == 1e-2, "the method's values stay"
    config = deepcopy(SHAPES[path.parent.name][0])
    config.num_hidden_layers = 1
    architecture = architecture_of(config)
    heads = heads_of(config, architecture)
    block = skeleton(config).get_submodule(architecture.blocks)[0]
    folding, _ = adapt(block, architecture, heads, recipe.transforms, recipe.scheme)
    attached = attach(block, architecture, heads, folding, recipe.weight_quantizer, recipe.scheme, torch.float16)
    assert len(attached.quantizers) == len(linears(block)) and not attached.carriers
    factors = [factor for transform in attached.transforms.values() for factor in transform.factors]
    assert {each.stability for each in factors if isinstance(each, Affine)} == {given["model"]["stability"]}
    assert {each.alpha for each in factors if isinstance(each, Diagonal)} == {given["model"].get("alpha", 0.5)}
    assert all(parameter.is_meta for parameter in attached.parameters())


@pytest.mark.parametrize("option, value", [("stability", 7.0), ("alpha", -0.5)])
def test_values_out_of_range_are_refused(option: str, value: float) -> None:
    model = QuantizedLanguageModel(transforms={"value_output": [Diagonal, Affine]}, **{option: value})
    with pytest.raises(RequestError, match=f"{option}.*{value}"):
        [factory(SiteShape(2, 4)) for factory in model.recipe.transforms["value_output"]]
