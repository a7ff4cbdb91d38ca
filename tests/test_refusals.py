"""Bad input ends in one sentence that names it and the fix, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS
from transformers import GPT2Config, GPT2LMHeadModel

from aq_lightning.cli import main

Fit = Callable[..., Path]


@pytest.fixture
def refused(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a ``fit`` that must be refused and returns the sentence."""

    def run(*arguments: str, scheme: str = "w4a16", config: str = "affinequant.yaml", out: Path | None = None) -> str:
        out = out or tmp_path / "run"
        before = sorted(out.rglob("*")) if out.exists() else None
        with pytest.raises(SystemExit) as exit:
            fit(scheme, out, *arguments, config=config)
        captured = capsys.readouterr()
        assert (exit.value.code, captured.out) == (2, "")
        assert (sorted(out.rglob("*")) if out.exists() else None) == before, "nothing may be written"
        assert not list(tmp_path.rglob("*.partial"))
        return sentence(captured.err)

    return run


def sentence(text: str) -> str:
    """The one line that a refusal prints, apart from the usage that jsonargparse puts around its own."""
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("usage: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


def copy_of(model_directory: Path, target: Path, *left_out: str) -> Path:
    shutil.copytree(model_directory, target, ignore=shutil.ignore_patterns(*left_out))
    return target


def test_missing_model_directory(refused, tmp_path: Path) -> None:
    message = refused(f"--model.pretrained={tmp_path / 'nowhere'}")
    assert "nowhere" in message and "does not exist" in message and "check the path" in message


def test_hub_id_without_a_hub(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("--model.pretrained=nobody/nothing-7b")
    assert "nobody/nothing-7b" in message and "no directory of that name" in message


@pytest.mark.parametrize("pickled", [False, True], ids=["empty", "pickled"])
def test_no_safetensors(refused, model_directory: Path, tmp_path: Path, pickled: bool) -> None:
    directory = copy_of(model_directory, tmp_path / "model", "*.safetensors")
    if pickled:
        torch.save({}, directory / "pytorch_model.bin")
    message = refused(f"--model.pretrained={directory}")
    assert str(directory) in message and "safetensors" in message and "save_pretrained" in message


def test_truncated_safetensors(refused, model_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(model_directory, tmp_path / "model")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert str(directory) in refused(f"--model.pretrained={directory}")


def test_broken_config(refused, model_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(model_directory, tmp_path / "model")
    (directory / "config.json").write_text("{")
    assert str(directory) in refused(f"--model.pretrained={directory}")


def test_no_tokenizer(refused, model_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(model_directory, tmp_path / "model", "tokenizer*")
    assert str(directory) in refused(f"--model.pretrained={directory}")


def test_unknown_architecture(refused, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    directory = copy_of(model_directory, tmp_path / "model", "*.safetensors", "config.json")
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=96, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(directory)
    capsys.readouterr()
    message = refused(f"--model.pretrained={directory}")
    for part in (
        "must be one of bloom, falcon, ",
        "qwen3_moe, got 'gpt2'",
        "aq_lightning/models/gpt2.py",
        "SPEC = Architecture(blocks=",
        "producer",
    ):
        assert part in message, part


def test_unknown_model_type(refused, model_directory: Path, tmp_path: Path) -> None:
    """One that transformers itself does not know."""
    directory = copy_of(model_directory, tmp_path / "model", "config.json")
    config = json.loads((model_directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "newllm"}))
    message = refused(f"--model.pretrained={directory}")
    assert str(directory) in message and "newllm" in message


@pytest.mark.parametrize("group", ["48", "3", "256"])
def test_group_that_does_not_divide(refused, group: str) -> None:
    message = refused(scheme=f"w3a16g{group}")
    assert f"got {group}" in message and "64 input channels" in message and "use 32 or 64" in message


def test_asymmetric_rounding_of_quantized_activations(refused) -> None:
    rounder = "--model.rounder=aq_lightning.rounders.GPTQ"
    message = refused(rounder, "--model.rounder.init_args.asymmetry=0.25", scheme="w4a8")
    assert "got scheme w4a8" in message and "GPTQ with asymmetry 0" in message
    message = refused(rounder, "--model.rounder.init_args.asymmetry=0.25", scheme="w4a16kv4")
    assert "got scheme w4a16kv4" in message and "a16 and no kv" in message


@pytest.mark.parametrize("name", ["w9a16", "w1a16", "w4", "w4a16g0", "w4a1", "w4a9", "W4A16", "int4", "w4a16g32symm"])
def test_bad_scheme(refused, name: str) -> None:
    message = refused(scheme=name)
    value = {"w9a16": "got 9", "w1a16": "got 1", "w4a16g0": "got 0", "w4a1": "got 1", "w4a9": "got 9"}.get(name, name)
    assert value in message


@pytest.mark.parametrize(
    "content, said", [("", "empty"), ("  \n", "empty"), ("word1 word2 word3", "at least 33, got 2")]
)
def test_too_little_text(refused, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "small.txt").write_text(content)
    message = refused(f"--data.source={tmp_path / 'small.txt'}")
    assert said in message


def test_too_little_text_to_evaluate(refused, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("word1 " * 60)
    assert "evaluation window of 32 tokens" in refused(f"--data.source={tmp_path / 'small.txt'}")


@pytest.mark.parametrize("source", ["missing.txt", "wikitext3"])
def test_unknown_text(refused, source: str) -> None:
    message = refused(f"--data.source={source}")
    assert f"'{source}'" in message and "wikitext2" in message


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_out_is_a_file(refused, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" if place == "file" else tmp_path / "file" / "run"
    message = refused(out=out)
    assert f"'{out}'" in message and "choose another --out" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_unwritable_out(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, hence the stand-in."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode))
    message = refused(out=tmp_path / "deep" / "run")
    assert "must be writable" in message and "deep/run" in message
    assert not (tmp_path / "deep").exists()


def test_out_holds_other_files(refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    message = refused()
    assert "holds other files" in message and "choose another --out" in message


def test_out_holds_another_configuration(fit: Fit, refused, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit("w4a16", tmp_path / "run", "--trainer.max_epochs=0")
    capsys.readouterr()
    for arguments, parts in (
        (["--model.batch_size=2"], ["batch_size: 4", "batch_size: 2"]),
        (["--data.samples=9"], ["samples: 8", "samples: 9"]),
    ):
        message = refused(*arguments, "--trainer.max_epochs=0")
        assert all(part in message for part in parts) and "choose another --out" in message
    message = refused("--trainer.max_epochs=0", scheme="w3a16")
    assert "- scheme: w4a16" in message and "+ scheme: w3a16" in message


YAML = """
model:
  transforms:
    {site}:
      - class_path: aq_lightning.transforms.{factor}
"""


@pytest.mark.parametrize(
    "site, factor, parts",
    [
        ("mlp_inputs", "Diagonal", ["'mlp_inputs'", "attention_input, query_key"]),
        (
            "attention_input",
            "Affine",
            [
                "attention_input",
                "Affine",
                "remove it from transforms.attention_input",
                "online: true",
                "4,096 multiply–adds per token",
            ],
        ),
        ("query_key", "Diagonal", ["query_key", "complex factor", "Diagonal", "transforms.query_key"]),
        ("mlp_hidden", "Shift", ["mlp_hidden", "Shift", "transforms.mlp_hidden"]),
    ],
)
def test_transform_that_does_not_fold(refused, tmp_path: Path, site: str, factor: str, parts: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(YAML.format(site=site, factor=factor))
    message = refused(config=str(tmp_path / "mine.yaml"))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "site, arguments, parts",
    [
        ("query_key", "online: true", ["got Affine: use Dense", "transforms.query_key"]),
        ("mlp_hidden", "online: true, block: 96", ["divide the 128 channels", "got 96", "use 64, or null"]),
        ("value_output", "block: 8", ["got 8 without online", "online: true"]),
    ],
)
def test_affine_that_cannot_be_online(refused, tmp_path: Path, site: str, arguments: str, parts: list[str]) -> None:
    text = YAML.format(site=site, factor="Affine") + f"        init_args: {{{arguments}}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    message = refused(config=str(tmp_path / "mine.yaml"))
    assert all(part in message for part in parts), message


def test_width_that_does_not_divide_the_hidden_size(refused) -> None:
    """Adapting to the architecture is no excuse for leaving it out."""
    message = refused(config="affinequant-block.yaml")
    assert "must divide the 64 channels of its site, got 128: use 1 or 2 or 4 or 8 or 16 or 32" in message


def test_what_folds_behind_what_is_online(refused, tmp_path: Path) -> None:
    text = YAML.format(site="mlp_input", factor="Affine") + "        init_args: {online: true}\n"
    (tmp_path / "mine.yaml").write_text(text + "      - class_path: aq_lightning.transforms.Diagonal\n")
    assert "got Diagonal behind an online factor: move it up" in refused(config=str(tmp_path / "mine.yaml"))


def test_late_shift(refused, tmp_path: Path) -> None:
    text = YAML.format(site="mlp_input", factor="Diagonal") + "      - class_path: aq_lightning.transforms.Shift\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert "first factor" in refused(config=str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("missing", ["--config", "--out"])
def test_method_and_place_are_needed(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"--config={CONFIGS / 'affinequant.yaml'}", f"--out={tmp_path / 'run'}"]
    kept = [argument for argument in arguments if not argument.startswith(missing)]
    with pytest.raises(SystemExit) as exit:
        main(["fit", f"--model.pretrained={model_directory}", *kept])
    assert exit.value.code == 2
    assert missing in sentence(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argument, parts",
    [
        ("--trainer.devices=2", ["one command line", "got 2", "--trainer.devices 1"]),
        ("--model.batch_size=0", ["batch_size", "0", "1 or more"]),
        ("--data.samples=0", ["data.samples", "0"]),
        ("--model.plan.size=0", ["plan.size", "0"]),
        ("--trainer.max_epochs=-1", ["max_epochs"]),
        ("--trainer.max_epochs=null", ["max_epochs"]),
        ("--trainer.precision=bf16-true", ["32-true", "bf16-true", "--trainer.precision"]),
        ("--trainer.gradient_clip_val=1.0", ["clipped", "fused false"]),
    ],
)
def test_bad_number(refused, argument: str, parts: list[str]) -> None:
    message = refused(argument)
    assert all(part in message for part in parts), message


def test_test_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["test", f"--model.pretrained={tmp_path / 'nowhere'}", f"--out={tmp_path / 'scored'}"])
    assert exit.value.code == 2 and "nowhere" in sentence(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Encountered `nan` values", "ignore:block 0, ")
def test_diverged_training_leaves_no_block(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen only while blocks are fitted: the sentence comes, and nothing of the block is kept."""
    with pytest.raises(SystemExit) as exit:
        fit("w4a16", tmp_path / "run", "--model.learning_rates.transform=1e30")
    assert exit.value.code == 2
    assert "learning_rates" in sentence(capsys.readouterr().err)
    assert not (tmp_path / "run/checkpoint").exists() and not (tmp_path / "run/blocks/0000").exists()
