"""``export``: a finished run in every format, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aq_lightning import conversion
from aq_lightning.cli import main
from aq_lightning.conversion import convert
from aq_lightning.errors import ParityError, RequestError
from aq_lightning.export import awq, parity
from aq_lightning.export.loading import open_model

IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 96


def export(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["export", *arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def run(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose shifts gained biases."""
    return fit("w4a16g32sym", tmp_path_factory.mktemp("finished") / "run")


def test_fit_checks_its_own_checkpoint(run: Path) -> None:
    parity = json.loads((run / "results.json").read_text())["parity"]
    assert parity.endswith("transformers' logits differ by 0.0e+00 with all 2 blocks (at most 0.0e+00)")
    card = (run / "checkpoint" / "README.md").read_text()
    assert "# model" in card and "base_model" not in card and str(run) not in card  # no path of a machine
    assert parity in card and "| affinequant |" in card and "vllm serve checkpoint`" in card


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "dense", "compressed-tensors"])
def test_every_format(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    assert export(f"--run={run}", f"--format={name}", f"--out={tmp_path / 'out'}", "--shard_gib=0.00002") == 0
    printed = capsys.readouterr().out
    assert f"{name}: {tmp_path / 'out'}\n" in printed and "tensors read back bit for bit" in printed
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "README.md"} <= files
    assert len([file for file in files if file.endswith(".safetensors")]) > 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| affinequant |" in card
        and "`w4a16g32sym`" in card
        and ("vllm serve out`" in card) == (name != "gptq_v2")
        and f"Format: {name}" in card
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_bias"]


@torch.no_grad()
def test_dense_is_an_ordinary_model(run: Path, tmp_path: Path) -> None:
    out, _ = convert(run, "dense", tmp_path / "out")
    ours, _, _ = open_model(str(run / "checkpoint"), torch.float16)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    expected = ours.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in theirs.state_dict().items())
    assert theirs.dtype == torch.float16


def test_the_default_place_and_one_file(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    out, verdict = convert(tmp_path / "run", "awq")
    assert out == tmp_path / "run" / "awq" and (out / "model.safetensors").is_file()
    assert "not loaded by a client (its clients are not installed here)" in str(verdict)


def test_layouts(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit("w3a16", tmp_path / "run")
    out, verdict = convert(run, "compressed-tensors", tmp_path / "dense", layout="dense")
    assert "does not read the dense layout of w3a16" in str(verdict)
    ours, other = (open_model(str(place), torch.float32)[0] for place in (run / "checkpoint", out))
    assert all(torch.equal(one, two) for one, two in zip(ours.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("arguments, message", [
    (["--format=gguf-q4_0"], "llama.cpp has tokenizers of byte-pair encoding, got WordLevel"),
    (["--format=awq", "--layout=dense"], "Only compressed-tensors has layouts"),
    (["--format=awq", "--shard_gib=0"], "has a positive size, got 0.0"),
])  # fmt: skip
def test_refusals(run: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    before = sorted(run.rglob("*"))
    assert export(f"--run={run}", *arguments) == 2
    assert message in capsys.readouterr().err and sorted(run.rglob("*")) == before


def test_refusals_of_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert export(f"--run={tmp_path}", "--format=awq") == 2
    assert "holds a finished checkpoint, got" in capsys.readouterr().err
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aq_lightning"}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="got quant_method 'aq_lightning', whose online transforms or quantized"):
        convert(tmp_path, "dense")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert export(f"--run={run}", "--format=awq", f"--out={tmp_path / 'out'}") == 2
    assert "must be new or empty" in capsys.readouterr().err


@pytest.mark.parametrize("scheme, name, message", [
    ("w4a4", "gptq", "gptq holds quantized weights only, got w4a4"),
    ("w4a16", "gptq", "Version 1 of GPTQ holds symmetric weights"),
    ("w3a16", "awq", "awq holds weights of 4 bits, got w3a16"),
    ("w5a16sym", "gptq", "gptq holds weights of 2 or 3 or 4 or 8 bits"),
    ("w8a8", "dense", "dense holds quantized weights only"),
])  # fmt: skip
def test_what_a_format_cannot_hold(
    fit: Callable[..., Path], tmp_path: Path, scheme: str, name: str, message: str
) -> None:
    run = fit(scheme, tmp_path / "run", config="rtn.yaml")
    with pytest.raises(RequestError, match=message):
        convert(run, name)
    assert not (run / name).exists() and not (run / f"{name}.unverified").exists()


def test_a_failing_check_keeps_what_was_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One output of each word wrong, as if the interleaving were another."""
    monkeypatch.setattr(awq, "_restore", lambda packed, correct=awq._restore: correct(packed).roll(1, 0))
    assert export(f"--run={run}", "--format=awq", f"--out={tmp_path / 'out'}") == 1
    assert "error: A checkpoint must hold the quantized model's weights bit for bit, got 14 of" in (
        capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.unverified"]
    monkeypatch.undo()
    assert export(f"--run={run}", "--format=awq", f"--out={tmp_path / 'out'}") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fit_keeps_a_checkpoint_that_fails(fit: Callable[..., Path], tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise ParityError("one differs")

    monkeypatch.setattr(parity, "check", refuse)
    with pytest.raises(SystemExit) as ended:
        fit("w4a16", tmp_path / "run", config="rtn.yaml")
    assert ended.value.code == 1
    assert (tmp_path / "run" / "checkpoint.unverified" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "checkpoint").exists() and not (tmp_path / "run" / "results.json").exists()
    monkeypatch.undo()
    fit("w4a16", tmp_path / "run", config="rtn.yaml")
    assert (tmp_path / "run" / "checkpoint").is_dir() and not (tmp_path / "run" / "checkpoint.unverified").exists()
    assert conversion.Run(tmp_path / "run").checkpoint.is_dir()
