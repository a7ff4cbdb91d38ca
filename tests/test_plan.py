"""A plan is what the run then does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS

from aq_lightning.calibration import BlockCalibration, RunDirectory
from aq_lightning.cli import main
from aq_lightning.plan import Measured, block_seconds
from aq_lightning.strategy import wished


@pytest.fixture
def plan(model_directory: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What is printed for the tiny model."""

    def run(*more: str, config: str = "affinequant.yaml") -> str:
        sizes = ["--data.samples=8", "--data.length=32", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
        main(["plan", f"--config={CONFIGS / config}", f"--model.pretrained={model_directory}", *sizes, *more])
        return capsys.readouterr().out

    return run


def size(text: str, name: str) -> float:
    """Bytes after a name."""
    number, unit = re.search(rf"{name}:? ([\d.]+) ([kMG]B)", text).groups()
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def used(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a4"])
def test_plan_is_what_the_run_does(
    plan: Callable[..., str], fit: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    """Bits exactly; disk and memory within 25 %."""
    text = plan(f"--model.scheme={scheme}")
    run = fit(scheme, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    bits = float(re.search(r"bits per weight: ([\d.]+)", text)[1])
    assert bits == pytest.approx(results["rows"][-1]["bits"], abs=1e-3)
    assert size(text, "result") == pytest.approx(used(run / "checkpoint"), rel=0.25)
    assert size(text, "blocks") == pytest.approx(used(run / "blocks"), rel=0.25)
    assert all(0 < block["training_seconds"] < block["seconds"] for block in results["blocks"])
    peak = max(block["peak_memory_bytes"] for block in results["blocks"])
    assert size(text, "host memory") == pytest.approx(peak, rel=0.25)


def test_plan_names_what_folds_and_what_stays_online(plan: Callable[..., str]) -> None:
    text = plan("--model.scheme=w4a16")
    assert re.search(r"^value_output +Diagonal, Affine +\(self_attn.v_proj → self_attn.o_proj\)$", text, re.M)
    assert "online" not in text
    text = plan("--model.scheme=w4a16", config="affinequant-dense.yaml")
    assert re.search(r"^attention_input +Shift, Diagonal, Affine \(online\)", text, re.M)
    assert "multiply–adds per token" in text


def test_plan_of_a_method_without_training(plan: Callable[..., str]) -> None:
    assert re.search(r"time: [\d.]+ s a block", plan(config="rtn.yaml"))


def test_plan_of_several_processes(plan: Callable[..., str]) -> None:
    """Wished for here, had elsewhere: a share of each batch is probed, and a share of the streams kept."""
    one, four = (plan("--model.scheme=w4a16", "--data.length=64", "--model.batch_size=8", f"--trainer.devices={n}")
                 for n in (1, 4))  # fmt: skip
    assert "host memory: " in one and "host memory of each of 4 processes: " in four and "one another" in four
    assert wished("auto", 2) == 2 * max(torch.cuda.device_count(), 1) and wished([0, 3], 2) == wished("0, 3", 2) == 4
    with pytest.raises(SystemExit):
        plan("--trainer.devices=9")


def test_time_counts_steps_and_passes() -> None:
    measured = Measured(
        trainings=2, step=2.0, epoch=0.25, forward=0.5, exact=0.75, other=0.125, rest=3.0, keeping=0.5, memory=0
    )
    found = block_seconds(measured, batches=10, epochs=20, same_input=True)
    assert found == 2 * 20 * (10 * 2.0 + 0.25) + 5 * 10 * 0.5 + 2 * 10 * 0.75 + 10 * 0.125 + 3.0
    slow = block_seconds(replace(measured, keeping=100.0), batches=10, epochs=20, same_input=True)
    assert slow == 10 * 100.0, "the disk is what everything waits for"


def test_a_step_is_all_that_is_done_for_it(plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows an update too, 2 epochs of 2 steps."""
    after = BlockCalibration.after_update
    monkeypatch.setattr(BlockCalibration, "after_update", lambda self: (time.sleep(0.5), after(self)))
    seconds = float(re.search(r"time: ([\d.]+) s a block", plan("--model.batch_size=4"))[1])
    assert 4 * 0.5 <= seconds <= 4 * 0.5 + 2


def test_writing_counts(plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The block with the work; streams beside it, and so only where they take longer."""

    def seconds(*more: str) -> float:
        return float(re.search(r"time: ([\d.]+) s a block", plan("--model.batch_size=2", *more))[1])

    commit, write = RunDirectory.commit, RunDirectory.write_streams
    assert seconds() < 4, "the control"
    monkeypatch.setattr(RunDirectory, "commit", lambda self, *a: (time.sleep(4), commit(self, *a)))
    assert 4 <= seconds() < 10
    monkeypatch.setattr(RunDirectory, "write_streams", lambda self, *a: (time.sleep(5), write(self, *a)))
    assert seconds() >= 10, "four batches, of which two are written in 5 s"
    assert seconds("--keep_streams=false") < 10


def test_a_full_disk_does_not_keep_a_plan_from_saying_so(
    plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDirectory, "put", full)
    text = plan("--keep_streams=false")
    assert "disk use: up to" in text and "streams" not in text and "s a block" in text


def test_plan_writes_nothing(plan: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan(f"--out={tmp_path / 'run'}")
    assert not list(tmp_path.iterdir())
