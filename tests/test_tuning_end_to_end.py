"""A run with tuned scales: what is exported, what is said of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CONFIGS
from safetensors.torch import load_file
from tiny import tiny
from transformers import AutoModelForCausalLM

from aq_lightning.calibration.attach import weights
from aq_lightning.cli import main
from aq_lightning.conversion import convert
from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors import read
from aq_lightning.export.loading import open_model
from aq_lightning.language_model import QuantizedLanguageModel
from aq_lightning.preparation import check_tuning, prepare
from aq_lightning.qtensor import QTensor
from aq_lightning.recipe import ScaleTuning
from aq_lightning.report import page
from aq_lightning.report.record import Record
from aq_lightning.status import status_of

Fit = Callable[..., Path]
METHOD = "affinequant-rounding.yaml"


@pytest.fixture(scope="module")
def run(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("w2a16g32", tmp_path_factory.mktemp("tuning") / "run", "--model.tuning.codes=0", config=METHOD)


@pytest.fixture(scope="module")
def plain(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without tuning."""
    return fit("w2a16g32", tmp_path_factory.mktemp("tuning") / "plain", "--model.tuning=null", config=METHOD)


def metrics(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())["tuning"]


def test_the_method_tunes_scales_and_norms_and_no_code(run: Path, plain: Path) -> None:
    tuned, before = (read(each / "checkpoint")[1] for each in (run, plain))
    changed = load_file(run / "tuning/weights.safetensors")
    assert set(tuned) == set(before) and metrics(plain) is None and not (plain / "tuning").exists()
    for name in tuned:
        new, old = tuned[name], before[name]
        if isinstance(new, QTensor):
            assert torch.equal(new.codes, old.codes) and torch.equal(new.zero, old.zero)
            assert torch.equal(new.scale, changed[name]) and not torch.equal(new.scale, old.scale)
        else:
            assert torch.equal(new, changed.get(name, old))
    norms = [name for name in changed if "norm" in name]
    assert len(norms) == 4 and all(changed[name].dtype == before[name].dtype for name in norms)
    assert not any(torch.equal(changed[name], before[name]) for name in norms)


def test_the_checkpoint_is_nearer_to_the_model(run: Path, plain: Path, model_directory: Path) -> None:
    """On tokens that it was not tuned on too."""
    found = metrics(run)["divergence"]
    assert metrics(run)["outcome"] == "trained" and found["after"] < found["before"]
    full = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    tokens = torch.randint(96, (8, 32), generator=torch.Generator().manual_seed(0))
    p = full(tokens).logits.double().log_softmax(-1)
    off = []
    for each in (run, plain):  # the tuned one first
        q = open_model(str(each / "checkpoint"), torch.float32)[0](tokens).logits.double().log_softmax(-1)
        off.append(float((p.exp() * (p - q)).sum(-1).mean().detach()))
    assert off[0] < off[1]


def test_codes_move_where_they_are_asked_to(plain: Path, fit: Fit, tmp_path: Path) -> None:
    moving = fit("w2a16g32", tmp_path / "run", "--model.tuning.codes=7e-3", config=METHOD)
    assert metrics(moving)["outcome"] == "trained"
    tuned, before = (read(each / "checkpoint")[1] for each in (moving, plain))
    coded = [name for name in before if isinstance(before[name], QTensor)]
    assert not any(torch.equal(tuned[name].codes, before[name].codes) for name in coded)
    assert all(torch.equal(tuned[name].zero, before[name].zero) for name in coded)


def test_a_damaged_tuning_is_made_again(run: Path, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    expected = (again / "checkpoint/model.safetensors").read_bytes()
    file = again / "tuning/weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (again / "results.json").unlink()
    shutil.rmtree(again / "checkpoint")
    fit("w2a16g32", again, "--model.tuning.codes=0", config=METHOD)
    assert "damaged, and made again: tuning" in capsys.readouterr().out
    assert (again / "checkpoint/model.safetensors").read_bytes() == expected


def test_other_formats_hold_it(run: Path) -> None:
    dense = load_file(convert(run, "dense")[0] / "model.safetensors")
    for name, tensor in read(run / "checkpoint")[1].items():
        value = tensor.dequantize(torch.float16) if isinstance(tensor, QTensor) else tensor
        assert torch.equal(dense[name], value), name


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8kv4g32"])
def test_activations_are_rounded_while_scales_are_tuned(fit: Fit, tmp_path: Path, scheme: str) -> None:
    found = metrics(fit(scheme, tmp_path / "run", config=METHOD))
    assert found["outcome"] == "trained" and found["divergence"]["after"] < found["divergence"]["before"]


def test_it_is_said(
    run: Path, plain: Path, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr("aq_lightning.report.figures._svg", lambda *_: "")  # words, not pictures
    assert "Scales of all blocks" in page([Record(run)]) and "Scales of all blocks" not in page([Record(plain)])
    assert "finished" in status_of(run)
    fit("w2a16g32", tmp_path / "run", "--model.tuning.scales=1e3", config=METHOD)
    said = capsys.readouterr().out
    assert metrics(tmp_path / "run")["outcome"] == "start"
    assert said.count("training did not help, so they were left as they were") == 2
    assert "training did not help" in page([Record(tmp_path / "run")])


def test_a_model_too_large_for_the_gpu_is_refused(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, tuning = torch.device("cuda"), ScaleTuning(2, 1e-2, 1e-2)
    prepared = prepare(QuantizedLanguageModel(str(model_directory), "w3a16g32", tuning=tuning))
    needed = prepared.tuning_memory(32)
    for there in (needed, needed - 1):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=there: SimpleNamespace(total_memory=n))
        if there == needed:
            check_tuning(prepared, 32, device)
        else:
            with pytest.raises(RequestError, match="add --model.tuning null"):
                check_tuning(prepared, 32, device)
    check_tuning(prepared, 32, torch.device("cpu"))
    check_tuning(prepare(QuantizedLanguageModel(str(model_directory), "w3a16g32")), 32, device)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_moving_codes_cost_four_numbers_each(name: str, tmp_path: Path) -> None:
    """In memory; on disk packed weights in the place of scales, and three numbers each in two checkpoints. Those of
    experts too."""
    tiny(name, torch.float16).model.save_pretrained(tmp_path)
    staying, moving = (
        prepare(QuantizedLanguageModel(str(tmp_path), "w3a16g16", tuning=ScaleTuning(2, 1e-2, 1e-2, codes)))
        for codes in (0.0, 1e-3)
    )
    codes = moving.blocks * sum(each.numel() for each in weights(moving.attached.block).values())
    held = moving.tuning_memory(32) - staying.tuning_memory(32)
    assert 16 * codes <= held <= 16.1 * codes  # routers are counted with the weights
    more = moving.disk(8, 32).tuning - staying.disk(8, 32).tuning
    assert 24 * codes < more <= 25 * codes and moving.disk(8, 32).result == staying.disk(8, 32).result


def test_a_plan_says_what_it_costs(model_directory: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--data.samples=8", "--data.length=32", "--trainer.accelerator=cpu"]
    main(["plan", f"--config={CONFIGS / METHOD}", f"--model.pretrained={model_directory}", *sizes])
    said = capsys.readouterr().out
    assert "tuning " in said and "for all and the tuning of their scales" in said


def test_what_the_model_writes_is_tuned_on_too(run: Path, fit: Fit, tmp_path: Path) -> None:
    """Kept in the run; blocks are fitted as without it, and other scales come of it."""
    options = ("--model.tuning.codes=0", "--model.tuning.written=6")
    more = fit("w2a16g32", tmp_path / "run", *options, config=METHOD)
    tokens = load_file(more / "written/written.safetensors")["tokens"]
    assert tokens.shape[0] == 6 and len(tokens.unique(dim=0)) == 6 and not (run / "written").exists()
    fitted = "blocks/0001/weights.safetensors"
    assert (more / fitted).read_bytes() == (run / fitted).read_bytes()
    assert metrics(more)["outcome"] == "trained" and metrics(more)["divergence"] != metrics(run)["divergence"]
    changed, before = (load_file(each / "tuning/weights.safetensors") for each in (more, run))
    assert changed.keys() == before.keys() and any(not torch.equal(changed[name], before[name]) for name in changed)
    file = more / "written/written.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (more / "results.json").unlink()
    shutil.rmtree(more / "checkpoint")
    expected = (more / "tuning/weights.safetensors").read_bytes()
    fit("w2a16g32", more, *options, config=METHOD)
    assert (more / "tuning/weights.safetensors").read_bytes() == expected, "written again, the same"
