"""4-bit runs with Kronecker products, matrices in attention and learned clips: stored, read back, scored as fitted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_close, relative_error
from transformers import AutoModelForCausalLM

from aq_lightning import deploy
from aq_lightning.cli import main
from aq_lightning.export.compressed_tensors import read
from aq_lightning.export.loading import open_model
from aq_lightning.quantizers import quantized
from aq_lightning.transforms.online import carried, carrier

CONFIG = "affinequant-online.yaml"
SCHEMES = ["w4a4", "w4a4kv4", "w4a8kv4"]
SHAPES = {
    "left": (8, 8),
    "right": (8, 8),
    "heads": (4, 4),
    "clip": (2,),
    "key_clip": (2,),
    "value_clip": (2,),
    "query": (1, 16, 16),
    "key": (1, 16, 16),
}
"""Of the tiny model's 64 channels in 4 heads; its MLP is 128 = 8 · 16 channels wide."""


def last_row(run: Path, file: str = "results.json") -> dict:
    return json.loads((run / file).read_text())["rows"][-1]


@pytest.fixture(scope="module", params=SCHEMES)
def run(request: pytest.FixtureRequest, fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kronecker") / request.param
    return fit(request.param, directory, "--trainer.max_epochs=4", config=CONFIG)


def cached(run: Path) -> bool:
    return run.name.endswith("kv4")


def test_rounding_is_learnt_with_the_products(fit: Callable[..., Path], tmp_path: Path) -> None:
    """The first block ends nearer to its target than with transforms and ranges alone."""
    losses = []
    for rate in (0.02, 0.0):
        run = fit(
            "w3a8", tmp_path / str(rate), "--trainer.max_epochs=12", f"--model.learning_rates.rounding={rate}",
            config=CONFIG,
        )  # fmt: skip
        losses.append(json.loads((run / "results.json").read_text())["blocks"][0]["loss"])
    assert losses[0] < 0.9 * losses[1]


def test_products_are_stored(run: Path) -> None:
    scheme, checkpoint = read(run / "checkpoint")
    assert str(scheme) == run.name
    assert any("self_attn.online" in name for name in checkpoint) == cached(run)
    found = {name: checkpoint[name] for name in checkpoint if carrier(name).startswith("model.layers.0.")}
    for name, tensor in found.items():
        down, leaf = "down_proj" in name, name.rpartition(".")[2]
        assert tensor.shape == ((16, 16) if down and leaf == "right" else SHAPES[leaf]), name
        assert tensor.dtype == torch.float16
    clips = torch.stack([tensor for name, tensor in found.items() if name.endswith("clip")]).float()
    assert len(clips) == (6 if cached(run) else 4) and (clips < 1).all() and (clips != clips[0, 0]).any(), "learnt"


def test_the_run_is_better_than_its_start_and_than_rounding(run: Path) -> None:
    for block in json.loads((run / "results.json").read_text())["blocks"]:
        assert block["outcome"] in ("trained", "first epoch", "best step")
        assert block["loss"] < min(block["initial_loss"], block["rtn_loss"])


def test_cost_is_that_of_the_small_matrices(run: Path) -> None:
    own = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    products = 2 * 64 * (8 + 8) + 64 * 4 + 128 * (8 + 16) + (96 * 16 if cached(run) else 0)
    assert last_row(run)["overhead"] == pytest.approx(100 * products / own)


def test_checkpoint_scores_as_in_the_table(run: Path, text_file: Path, tmp_path: Path) -> None:
    main(
        ["test", f"--model.pretrained={run / 'checkpoint'}", f"--data.source={text_file}", "--data.length=32"]
        + ["--trainer.accelerator=cpu", f"--out={tmp_path / 'scored'}"]
    )
    scored, row = last_row(tmp_path / "scored", "test.json"), last_row(run)
    assert {name: scored[name] for name in row} == {**row, "model": str(run / "checkpoint")}


def test_clips_are_left_out_where_activations_stay(fit: Callable[..., Path], tmp_path: Path, capsys) -> None:
    directory = fit("w3a16g32", tmp_path / "run", "--trainer.max_epochs=0", config=CONFIG) / "checkpoint"
    said = capsys.readouterr().out
    assert "left out: Clip is a part of rounding activations, got scheme w3a16g32" in said
    assert "left out: Online at query_key Dense serves rounded keys, got scheme w3a16g32" in said
    _, checkpoint = read(directory)
    assert {name.rpartition(".")[2] for name in checkpoint if carrier(name)} == {"left", "right", "heads"}


def test_the_cache_is_a_part_of_the_checkpoint(run: Path, text_file: Path, tmp_path: Path) -> None:
    """Negative control: without the grid of keys and values it is another model, or there was none."""
    directory = shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"].pop("key_value", None) == (
        {"bits": 4, "group_size": None} if cached(run) else None
    )
    (directory / "config.json").write_text(json.dumps(config))
    main(
        ["test", f"--model.pretrained={directory}", f"--data.source={text_file}", "--data.length=32"]
        + ["--trainer.accelerator=cpu", f"--out={tmp_path / 'scored'}"]
    )
    differs = last_row(tmp_path / "scored", "test.json")["perplexity"] != last_row(run)["perplexity"]
    assert differs == cached(run)


@torch.no_grad()
def test_transformers_with_this_package_runs_it(run: Path) -> None:
    """Packed, and joined; 4-bit rounding magnifies sums in another order."""
    directory, ids = run / "checkpoint", torch.arange(2 * 24).reshape(2, 24) * 7 % 96
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference, _, scheme = open_model(str(directory), torch.float32)
    with quantized(reference.model.layers, scheme):
        expected = reference(ids).logits
    assert_close("packed", expected, model(ids).logits, 0.2)
    assert_close("joined", expected, deploy.fuse(model)(ids).logits, 0.2)
    for _, online in carried(model):
        for tensor in online.parameters():
            tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
    assert relative_error(expected, model(ids).logits) > 0.5, "negative control"
