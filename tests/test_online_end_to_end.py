"""A run with online transforms: its checkpoint answers as the run's table says, here, and nowhere else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from aq_lightning import pipeline
from aq_lightning.calibration import LiveWindow, RunDirectory
from aq_lightning.cli import main
from aq_lightning.deploy import Int4Linear
from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors import read
from aq_lightning.export.loading import open_model
from aq_lightning.quantizers import quantized_activations
from aq_lightning.transforms.online import carried, carrier

SCHEMES = ["w3a16g32", "w4a4"]
IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
NAMES = [f"model.layers.{k}.{norm}_layernorm.online.0.inverse" for k in (0, 1) for norm in ("input", "post_attention")]
LONGER = ["--trainer.max_epochs=6", "--model.learning_rates.transform=1e-2", "--model.stability=0.1"]
"""Enough for the off-diagonals to grow beyond float16's rounding."""
OWN = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128  # multiply–adds per token of a block's linears


def last_row(run: Path, file: str = "results.json") -> dict:
    return json.loads((run / file).read_text())["rows"][-1]


@pytest.fixture(scope="module")
def finished(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of each scheme with the dense configuration, made once."""
    made: dict[str, Path] = {}

    def run(scheme: str) -> Path:
        if scheme not in made:
            out = tmp_path_factory.mktemp("dense") / scheme
            made[scheme] = fit(scheme, out, *LONGER, config="affinequant-dense.yaml")
        return made[scheme]

    return run


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    """Of a checkpoint in float32."""
    model, _, scheme = open_model(str(directory), torch.float32)
    with quantized_activations(model.model.layers, scheme.activation):
        return model(IDS).logits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_table_says_what_it_costs(finished: Callable[[str], Path], scheme: str) -> None:
    """Two dense matrices a block, at 64 channels: as many numbers and multiply–adds as 2 · 64² weights."""
    row = last_row(finished(scheme))
    assert row["overhead"] == 100 * 2 * 64 * 64 / OWN
    rows = json.loads((finished(scheme) / "results.json").read_text())["rows"]
    assert [each["overhead"] for each in rows[:2]] == [0, 0]
    nearest = rows[1]["bits"]
    biases = 16 * (64 + 32 + 32 + 64 + 128 + 128 + 64) / OWN  # of the shifts
    assert row["bits"] == pytest.approx(nearest + 16 * 2 * 64 * 64 / OWN + biases, rel=1e-12)


def test_cost_is_printed_before_the_run_and_in_its_table(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fit("w3a16g32", tmp_path / "run", "--trainer.max_epochs=0", config="affinequant-dense.yaml")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("online: attention_input (input_layernorm): 4,096 multiply–adds per token (+11.11 %)")
    assert lines[1].startswith("online: mlp_input (post_attention_layernorm): 4,096 multiply–adds per token (+11.11 %)")
    assert lines[2].startswith("online in all") and "16,384 multiply–adds per token (+22.22 %)" in lines[2]
    (head,) = (number for number, line in enumerate(lines) if line.startswith("model "))
    table = lines[head : head + 4]
    assert table[0].endswith("multiply–adds") and table[3].endswith("+22.22 %") and table[2].endswith("+0.00 %")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoint_scores_as_in_the_table(
    finished: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, scheme: str
) -> None:
    run = finished(scheme)
    capsys.readouterr()
    main(
        ["test", f"--model.pretrained={run / 'checkpoint'}", f"--data.source={text_file}", "--data.length=32"]
        + ["--trainer.accelerator=cpu", f"--out={tmp_path / 'scored'}"]
    )
    scored = last_row(tmp_path / "scored", "test.json")
    row = last_row(run)
    assert {name: scored[name] for name in row} == {**row, "model": str(run / "checkpoint")}
    assert "+22.22 %" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoint_answers_as_the_calibrated_blocks(
    fit: Callable[..., Path], finished: Callable[[str], Path], tmp_path: Path, scheme: str, monkeypatch
) -> None:
    """To the last bit: each block as it was when its window was finished, and the same block of the checkpoint."""
    hidden = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    calibrated: list[Tensor] = []
    original = LiveWindow.release

    def release(live: LiveWindow) -> None:
        with quantized_activations(live.blocks, live.recipe.scheme.activation):
            calibrated.append(live.run(hidden))
        original(live)

    monkeypatch.setattr(LiveWindow, "release", release)
    run = fit(scheme, tmp_path / "run", *LONGER, config="affinequant-dense.yaml")
    model, _, parsed = open_model(str(run / "checkpoint"), torch.float32)
    assert [name for name, _ in model.named_parameters() if carrier(name)] == NAMES
    rotary = model.model.rotary_emb(hidden, torch.arange(32)[None])
    with quantized_activations(model.model.layers, parsed.activation):
        for block, expected in zip(model.model.layers, calibrated, strict=True):
            assert torch.equal(block(hidden, position_embeddings=rotary), expected)
    assert torch.equal(logits(run / "checkpoint"), logits(finished(scheme) / "checkpoint")), "and the run is repeatable"


def test_products_are_stored_and_trained(finished: Callable[[str], Path]) -> None:
    run = finished("w3a16g32")
    _, checkpoint = read(run / "checkpoint")
    stored = {name: checkpoint[name] for name in checkpoint if carrier(name)}
    assert sorted(stored) == sorted(NAMES)
    assert any((tensor[0] - tensor[0].diag().diag()).abs().max() > 1e-4 for tensor in stored.values()), "dense"
    assert all(tensor.shape == (1, 64, 64) and tensor.dtype == torch.float16 for tensor in stored.values())
    with safe_open(run / "blocks/0000/weights.safetensors", "pt") as journal:
        assert [name for name in journal.keys() if carrier(name)] == sorted(NAMES[:2])


def test_without_its_products_the_model_is_another(finished: Callable[[str], Path]) -> None:
    """Negative control."""
    directory = finished("w3a16g32") / "checkpoint"
    model, _, _ = open_model(str(directory), torch.float32)
    expected = logits(directory)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
        for _, online in carried(model):
            online[0].inverse.copy_(torch.eye(64)[None])
        assert (model(IDS).logits - expected).abs().max() > 1e-3


ELSEWHERE = """
import sys, transformers
for directory in sys.argv[1:]:
    for kind in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        try:
            getattr(transformers, kind).from_pretrained(directory)
            print("it went on, with random weights")
        except Exception as error:
            print(type(error).__name__, *str(error).split())
"""


@pytest.fixture(scope="module")
def elsewhere(finished: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How transformers alone, in a process of its own, fails to load a checkpoint by two names, and the checkpoint
    without what names its weights by the same names."""
    whole = finished("w3a16g32") / "checkpoint"
    unnamed = shutil.copytree(whole, tmp_path_factory.mktemp("unnamed") / "checkpoint")
    config = json.loads((unnamed / "config.json").read_text())
    del config["transformers_weights"]
    (unnamed / "config.json").write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, whole, unnamed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", [0, 1], ids=["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_transformers_alone_refuses_it_by_name(elsewhere: list[str], kind: int) -> None:
    """Whatever it makes of the quantization method, it must not go on with random weights."""
    refusal = elsewhere[kind]
    assert refusal.startswith(("ValueError", "OSError")) and "aq_lightning" in refusal


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_with_this_package_runs_it(finished: Callable[[str], Path], scheme: str) -> None:
    directory = finished(scheme) / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear)
    rounded = scheme == "w4a4"  # a token's largest activation lies on an edge of its grid
    assert_close(scheme, logits(directory), model(IDS).logits, 0.2 if rounded else 1e-6)


def test_transformers_alone_finds_no_weights_of_it(elsewhere: list[str]) -> None:
    """Versions that do not read what names the weights look for files of their own names, and there are none."""
    assert "no file named model.safetensors" in elsewhere[2]


def test_config_wraps_the_section_of_compressed_tensors(finished: Callable[[str], Path], fit, tmp_path: Path) -> None:
    directory = finished("w3a16g32") / "checkpoint"
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    plain = fit("w3a16g32", tmp_path / "plain", "--trainer.max_epochs=0")
    inner = json.loads((plain / "checkpoint/config.json").read_text())["quantization_config"]
    assert section == {
        "quant_method": "aq_lightning",
        "compressed_tensors": inner,
        "online": [name.removesuffix(".online.0.inverse") for name in sorted(NAMES)],
    }
    assert inner["quant_method"] == "compressed-tensors"
    assert {path.name for path in directory.glob("*.safetensors")} == {"aq_lightning.safetensors"}


@pytest.mark.parametrize("change", ["fewer", "none"])
def test_a_changed_list_of_modules_is_refused(finished: Callable[[str], Path], tmp_path: Path, change: str) -> None:
    directory = shutil.copytree(finished("w3a16g32") / "checkpoint", tmp_path / "checkpoint")
    config = json.loads((directory / "config.json").read_text())
    online = config["quantization_config"]["online"]
    config["quantization_config"]["online"] = online[:1] if change == "fewer" else []
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="holds the online products|holds model.safetensors"):
        open_model(str(directory))


@pytest.mark.parametrize("owner, name, call", [(RunDirectory, "commit", 2), (pipeline, "_tensors", 1)])
def test_interrupted_run_ends_in_the_same_bytes(
    finished: Callable[[str], Path], fit: Callable[..., Path], tmp_path: Path, monkeypatch, owner, name, call
) -> None:
    original, left = getattr(owner, name), [call]

    def crash(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("power cut")
        return original(*arguments)

    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        fit("w4a4", tmp_path / "run", *LONGER, config="affinequant-dense.yaml")
    fit("w4a4", tmp_path / "run", *LONGER, config="affinequant-dense.yaml")
    for file in ("aq_lightning.safetensors", "config.json"):
        there = finished("w4a4") / "checkpoint" / file
        assert (tmp_path / "run/checkpoint" / file).read_bytes() == there.read_bytes()
