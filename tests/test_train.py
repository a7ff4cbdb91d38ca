"""``fit`` and ``test`` from end to end: what a run leaves behind, and that it can be trusted."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from aq_lightning import comparison, pipeline
from aq_lightning.calibration import BlockCalibration, Cause, RunDirectory
from aq_lightning.cli import main
from aq_lightning.export.loading import open_model
from aq_lightning.models.lookup import architecture_of
from aq_lightning.quantizers import quantized_activations
from callbacks import ConditionNumber

SCHEMES = ["w4a16", "w3a16g32", "w4a4", "w4a16g32sym", "w8a8"]
IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
Fit = Callable[..., Path]


def digests(directory: Path, pattern: str = "**/*") -> dict[str, str]:
    """File → sha256 of its bytes."""
    files = [path for path in directory.glob(pattern) if path.is_file()]
    assert files, f"no {pattern} in {directory}"
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(run: Path, file: str = "results.json") -> dict[str, float]:
    """Model → perplexity of the final table."""
    return {row["model"]: row["perplexity"] for row in json.loads((run / file).read_text())["rows"]}


def metrics(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("blocks/*/metrics.json"))]


@torch.no_grad()
def answer(directory: Path) -> Tensor:
    """Logits of a checkpoint in float32, as this package reads it."""
    model, _, scheme = open_model(str(directory), torch.float32)
    blocks = model.get_submodule(architecture_of(model.config).blocks)
    with quantized_activations(blocks, scheme and scheme.activation):
        return model(IDS).logits


@pytest.fixture(scope="module")
def finished(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of each scheme, made once."""
    made: dict[str, Path] = {}

    def run(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = fit(scheme, tmp_path_factory.mktemp("finished") / scheme)
        return made[scheme]

    return run


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object, str, int], None]]:
    """Makes the ``call``-th call of a function raise, once."""

    def arrange(owner: object, name: str, call: int) -> None:
        original, left = getattr(owner, name), [call]

        def stand_in(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("power cut")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, stand_in)

    yield arrange


@pytest.mark.parametrize("scheme", SCHEMES)
def test_run_directory(finished: Callable[[str], Path], scheme: str) -> None:
    run = finished(scheme)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "fingerprint.json", "baselines.json", "blocks", "logs", "checkpoint", "checkpoint.json",
        "results.json",
    }  # fmt: skip
    assert [path.name for path in sorted((run / "blocks").iterdir())] == ["0000", "0001"]
    for block in (run / "blocks").iterdir():
        assert {path.name for path in block.iterdir()} == {
            "manifest.json", "metrics.json", "transforms.safetensors", "weights.safetensors"
        }  # fmt: skip
        learnt = load_file(block / "transforms.safetensors")
        outcome = json.loads((block / "metrics.json").read_text())["outcome"]
        assert bool(learnt) == (outcome != "nearest")
        assert all(tensor.dtype == torch.float64 for tensor in learnt.values())
    names = {path.name for path in (run / "checkpoint").iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not [path for path in run.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_metrics(finished: Callable[[str], Path], scheme: str) -> None:
    run = finished(scheme)
    assert list(rows(run)) == ["full precision", "round to nearest", "affinequant"]
    assert all(math.isfinite(value) and value > 1 for value in rows(run).values())
    assert len({*rows(run).values()}) == 3 or {block["outcome"] for block in metrics(run)} == {"nearest"}
    blocks = metrics(run)
    assert [block["block"] for block in blocks] == [0, 1]
    others = ("condition", "candidates", "causes", "outcome", "margin", "reach")
    numbers = [value for block in blocks for name, value in block.items() if name not in others]
    conditions = [value for block in blocks for value in block["condition"].values()]
    assert all(math.isfinite(value) for value in numbers) and all(1 <= value < 1e6 for value in conditions)
    for block in blocks:
        assert block["loss"] <= 1.001 * min(block["rtn_loss"], block["initial_loss"]), "no block ends worse"
        assert block["candidates"][block["outcome"]] == min(block["candidates"].values())
        assert {"trained", "first epoch", "start", "nearest"} == set(block["candidates"]) and not block["causes"]
        assert set(block["margin"]) == ({"value_output"} if block["condition"] else set())
        assert all(0 < margin <= 1 for margin in block["margin"].values())
    assert json.loads((run / "results.json").read_text())["blocks"] == blocks


def test_blocks_are_fitted_with_their_activations_quantized(finished: Callable[[str], Path]) -> None:
    """The same 4-bit weights lose more, already in block 0, when their inputs have 4 bits too."""
    with_activations, without = (metrics(finished(scheme))[0] for scheme in ("w4a4", "w4a16"))
    for loss in ("rtn_loss", "initial_loss", "loss"):
        assert with_activations[loss] > 1.5 * without[loss]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_computes_the_same(
    finished: Callable[[str], Path], model_directory: Path, scheme: str, tmp_path: Path
) -> None:
    checkpoint = finished(scheme) / "checkpoint"
    ours = answer(checkpoint)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(IDS).logits
    assert (theirs - ours).abs().max() == 0.0
    assert (answer(model_directory) - ours).abs().max() > 1e-3, "rounding must show"


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_config_replays_to_the_same_bytes(finished: Callable[[str], Path], tmp_path: Path, scheme: str) -> None:
    main(["fit", f"--config={finished(scheme) / 'config.yaml'}", f"--out={tmp_path / 'replay'}"])
    replayed, first = (digests(run / "checkpoint") for run in (tmp_path / "replay", finished(scheme)))
    assert replayed.pop("README.md") != first.pop("README.md"), "which names the configuration's file"
    assert replayed == first
    for pattern in ("blocks/*/*.safetensors", "config.yaml"):
        assert digests(tmp_path / "replay", pattern) == digests(finished(scheme), pattern)
    assert list(rows(tmp_path / "replay").values()) == list(rows(finished(scheme)).values())


def test_other_seeds_give_other_bytes(finished: Callable[[str], Path], fit: Fit, tmp_path: Path) -> None:
    """Negative control of every comparison of bytes; the order of samples alone makes a difference."""
    other = fit("w4a16", tmp_path / "run", "--data.seed=43")
    assert digests(other / "checkpoint") != digests(finished("w4a16") / "checkpoint")


def test_rerun_prints_the_table_and_touches_nothing(
    finished: Callable[[str], Path], fit: Fit, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    fit("w4a16", tmp_path / "run")
    said, model, table = capsys.readouterr().out.partition("model  ")
    table = model + table
    assert said.startswith("disk use: up to ")
    assert {line.split("  ")[0] for line in table.splitlines()[:4]} == {"model", *rows(tmp_path / "run")}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    fit("w4a16", tmp_path / "run")
    said, _, again = capsys.readouterr().out.partition("\n")
    assert said == f"{tmp_path / 'run'} is finished: nothing is left to do." and again == table
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


CRASHES = {
    "in block 0": (BlockCalibration, "training_step", 2),
    "in block 1": (BlockCalibration, "training_step", 6),  # 8 windows by 4 are 2 steps an epoch, 4 a block
    "before the commit of block 1": (RunDirectory, "commit", 2),
    "in the export": (pipeline, "_tensors", 1),
    "after the export": (comparison.Comparison, "checkpoint", 1),
    "before the table": (RunDirectory, "finish", 1),
}


@pytest.mark.parametrize("moment", list(CRASHES))
def test_interrupted_run_ends_in_the_same_bytes(
    finished: Callable[[str], Path], fit: Fit, crash: Callable, tmp_path: Path, moment: str
) -> None:
    crash(*CRASHES[moment])
    with pytest.raises(RuntimeError, match="power cut"):
        fit("w4a4", tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    fit("w4a4", tmp_path / "run")
    assert digests(tmp_path / "run" / "checkpoint") == digests(finished("w4a4") / "checkpoint")
    assert digests(tmp_path / "run", "blocks/*/*.safetensors") == digests(finished("w4a4"), "blocks/*/*.safetensors")
    assert rows(tmp_path / "run") == rows(finished("w4a4"))


def test_finished_blocks_are_not_fitted_again(fit: Fit, crash: Callable, tmp_path: Path) -> None:
    crash(BlockCalibration, "training_step", 6)
    with pytest.raises(RuntimeError, match="power cut"):
        fit("w4a16", tmp_path / "run")
    before = (tmp_path / "run/blocks/0000/metrics.json").stat().st_mtime_ns
    fit("w4a16", tmp_path / "run")
    assert (tmp_path / "run/blocks/0000/metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("epochs", [0, 1])
def test_few_epochs(fit: Fit, tmp_path: Path, epochs: int) -> None:
    run = fit("w3a16g32", tmp_path / "run", f"--trainer.max_epochs={epochs}")
    assert math.isfinite(rows(run)["affinequant"])
    for block in metrics(run):
        assert (block["loss"] == pytest.approx(block["initial_loss"], rel=1e-3)) == (epochs == 0)
    learnt = load_file(run / "blocks/0000/transforms.safetensors")
    mask = learnt["0.transforms.value_output.factors.1.mask"]
    assert bool((mask[0, -1] != 0) == (epochs == 1)), "one epoch opens the whole band, none leaves the diagonal"


def test_training_improves_with_epochs(fit: Fit, tmp_path: Path) -> None:
    trained = metrics(fit("w3a16g32", tmp_path / "run", "--trainer.max_epochs=8"))
    assert trained[0]["loss"] < 0.9 * trained[0]["initial_loss"]
    assert trained[0]["loss"] < 0.9 * trained[0]["rtn_loss"]


@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a4"])
def test_nothing_to_train_is_round_to_nearest(fit: Fit, tmp_path: Path, scheme: str) -> None:
    run = fit(scheme, tmp_path / "run", config="rtn.yaml")
    assert rows(run)["rtn"] == pytest.approx(rows(run)["round to nearest"], rel=1e-6)
    assert all(block["loss"] == pytest.approx(block["rtn_loss"], rel=1e-6) for block in metrics(run))
    table = json.loads((run / "results.json").read_text())["rows"]
    assert table[1]["bits"] == table[2]["bits"]


def test_two_blocks_in_a_window(fit: Fit, tmp_path: Path) -> None:
    run = fit("w3a16g32", tmp_path / "run", "--model.plan.size=2", "--trainer.max_epochs=4")
    (window,) = metrics(run)
    assert window["loss"] < window["rtn_loss"]
    learnt = load_file(run / "blocks/0000/transforms.safetensors")
    assert {name.split(".")[0] for name in learnt} == {"0", "1"}
    assert (answer(run / "checkpoint")).isfinite().all()


@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a4"])
def test_checkpoint_scores_as_in_the_table(
    finished: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, scheme: str
) -> None:
    run = finished(scheme)
    capsys.readouterr()
    main(
        ["test", f"--model.pretrained={run / 'checkpoint'}", f"--data.source={text_file}", "--data.length=32"]
        + ["--trainer.accelerator=cpu", f"--out={tmp_path / 'scored'}"]
    )
    (scored,) = rows(tmp_path / "scored", "test.json").values()
    assert scored == rows(run)["affinequant"]
    assert f"{scored:.2f}" in capsys.readouterr().out


def test_evaluation_on_another_file(fit: Fit, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(text_file.read_text().split())))
    run = fit("w4a16", tmp_path / "run", f"--data.evaluation={other}")
    common = [f"--data.evaluation={other}", "--data.evaluation_length=32", "--trainer.accelerator=cpu"]
    table = (run / "results.json").read_bytes()
    main(["test", f"--model.pretrained={run / 'checkpoint'}", *common, f"--out={run}"])
    assert list(rows(run, "test.json").values()) == [rows(run)["affinequant"]]
    assert (run / "results.json").read_bytes() == table, "a score beside a run leaves its table alone"


def test_a_quantized_model_is_not_calibrated_again(
    finished: Callable[[str], Path], fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit:
        fit("w4a16", tmp_path / "run", f"--model.pretrained={finished('w4a16') / 'checkpoint'}")
    assert exit.value.code == 2 and "quantized already" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_logs_have_one_row_for_each_block_and_epoch(finished: Callable[[str], Path]) -> None:
    run = finished("w4a16")
    with (run / "logs/version_0/metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(float(row["block"]), float(row["epoch"])) for row in table] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [int(row["step"]) for row in table] == [0, 1, 2, 3]
    assert all(float(row["loss"]) > 0 and float(row["condition/value_output"]) >= 1 for row in table)
    events = EventAccumulator(str(run / "logs/version_0")).Reload().Scalars("loss")
    assert [event.step for event in events] == [0, 1, 2, 3]
    assert [event.value for event in events] == pytest.approx([float(row["loss"]) for row in table])


def test_users_own_callback_and_logger(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--trainer.*`` reaches the Trainer of every block."""
    seen: list[int] = []
    monkeypatch.setattr(ConditionNumber, "on_train_epoch_end", lambda *_: seen.append(1))
    run = fit("w4a16", tmp_path / "run", "--trainer.logger=false", "--trainer.max_epochs=3")
    assert len(seen) == 6
    assert not (run / "logs").exists()


def test_a_real_process_writes_nothing_to_stderr(model_directory: Path, text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "fit", "--config", "configs/affinequant.yaml"]
    command += ["--model.pretrained", model_directory, "--model.scheme", "w3a16g32", "--data.source", text_file]
    command += ["--data.samples", "8", "--data.length", "32", "--trainer.max_epochs", "1"]
    command += ["--trainer.accelerator", "cpu", "--out", tmp_path / "run"]
    environment = {**os.environ, "AQ_LIGHTNING_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert lines[:6] == [
        "disk use",
        "scoring the model as it is, and rounded to nearest",
        "block 0 (1 of 2)",
        "block 1 (2 of 2)",
        "writing and checking the checkpoint",
        "scoring the result",
    ]
    assert lines[10:14] == ["checkpoint", "checked", "report", "next"] and len(lines) == 16, "four of them the table"
    assert re.fullmatch(
        r"block 0 \(1 of 2\): loss \S+ \(round to nearest \S+\), \d+ s, \d\.\d\d GB, \d+ s left",
        done.stdout.splitlines()[2],
    )


@pytest.mark.filterwarnings("ignore:block .*condition number")
@pytest.mark.parametrize("rates", [("1e6", "1e-2"), ("5e-3", "1e6"), ("1e6", "1e6")])
def test_divergence_ends_in_a_fallback_not_in_a_crash(
    fit: Fit, capsys: pytest.CaptureFixture, tmp_path: Path, rates: tuple[str, str]
) -> None:
    """Steps of any size leave a finite checkpoint that is no worse than round-to-nearest, and the report says so."""
    names = ("transform", "clipping")
    run = fit(
        "w3a16g32", tmp_path / "run", *(f"--model.learning_rates.{n}={r}" for n, r in zip(names, rates, strict=True))
    )
    assert all(math.isfinite(value) for value in rows(run).values())
    for block in metrics(run):
        assert block["loss"] <= 1.001 * min(block["rtn_loss"], block["initial_loss"])
    outcomes = {block["outcome"] for block in metrics(run)}
    assert outcomes <= {"trained", "rolled back", "first epoch", "start", "nearest"} and outcomes != {"trained"}
    kept = [f"{block['block']} ({block['outcome']})" for block in metrics(run) if block["outcome"] != "trained"]
    said = capsys.readouterr().out
    assert f"training did not help, so these blocks were left as named: {', '.join(kept)}" in said
    stopped = [cause for block in metrics(run) for cause in block["causes"]]
    assert said.count("an attempt was stopped, ") == len(stopped) and bool(stopped) == (rates[0] == "1e6")
    assert all(f"{Cause(**cause)}" in said for cause in stopped)
    assert all(block["attempts"] == min(len(block["causes"]) + 1, 3) for block in metrics(run))


@pytest.mark.parametrize("config", ["signround.yaml", "affinequant-rounding.yaml"])
@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a8sym"])
def test_learned_rounding_end_to_end(fit: Fit, tmp_path: Path, config: str, scheme: str) -> None:
    """The codes that training saw are the codes in the checkpoint; the offsets themselves are left out."""
    rates = ["--model.learning_rates.rounding=0.05", "--model.learning_rates.clipping=0.05"]
    run = fit(scheme, tmp_path / "run", "--trainer.max_epochs=10", *rates, config=config)
    for block in metrics(run):
        assert block["outcome"] in ("trained", "best step") and block["loss"] < 0.8 * block["rtn_loss"]
        assert block["loss"] == pytest.approx(block["candidates"][block["outcome"]], rel=0.02)
    learnt = load_file(run / "blocks/0000/transforms.safetensors")
    assert learnt and not [name for name in learnt if name.endswith("offset")]
    assert answer(run / "checkpoint").isfinite().all()


@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a8sym"])
def test_awq_end_to_end(fit: Fit, tmp_path: Path, scheme: str) -> None:
    run = fit(scheme, tmp_path / "run", "--trainer.max_epochs=0", config="awq.yaml")
    for block in metrics(run):
        assert block["outcome"] != "nearest" and block["loss"] < 0.95 * block["rtn_loss"]
        assert set(block["condition"]) == {"attention_input", "value_output", "mlp_input", "mlp_hidden"}
    assert answer(run / "checkpoint").isfinite().all()


@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a8sym"])
def test_gptq_end_to_end(fit: Fit, tmp_path: Path, scheme: str) -> None:
    """Each block, and the model, lose less than with the nearest codes on the same grid."""
    run = fit(scheme, tmp_path / "run", config="gptq.yaml")
    for block in metrics(run):
        assert block["loss"] < 0.9 * block["rtn_loss"]
        assert block["loss"] == pytest.approx(block["rounder_loss"], rel=0.02)
    found = load_file(run / "blocks/0000/weights.safetensors")
    nearest = load_file(fit(scheme, tmp_path / "rtn", config="rtn.yaml") / "blocks/0000/weights.safetensors")
    same = {name: torch.equal(tensor, nearest[name]) for name, tensor in found.items()}
    assert not any(equal for name, equal in same.items() if name.endswith("weight_packed")), "other codes"
    assert all(equal for name, equal in same.items() if not name.endswith("weight_packed")), "on the same grid"


def test_references_are_rows_of_the_table(fit: Fit, tmp_path: Path) -> None:
    run = fit("w4a16", tmp_path / "run", "--model.references=[nf4,int8]", config="rtn.yaml")
    assert list(rows(run)) == ["full precision", "round to nearest", "bitsandbytes nf4", "bitsandbytes int8", "rtn"]


@pytest.mark.filterwarnings("ignore:block .*condition number")
def test_the_papers_settings_end_to_end(fit: Fit, tmp_path: Path) -> None:
    run = fit("w4a4", tmp_path / "run", "--trainer.max_epochs=3", config="affinequant-paper.yaml")
    learnt = load_file(run / "blocks/0000/transforms.safetensors")
    assert learnt["0.transforms.value_output.factors.2.mask"][0, -1] == pytest.approx(0.1)
    assert all(block["loss"] < 0.9 * block["rtn_loss"] for block in metrics(run))
