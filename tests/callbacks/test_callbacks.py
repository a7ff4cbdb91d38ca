"""The callbacks over a real fit of the tiny model."""

from __future__ import annotations

import csv
import json
import os
import pty
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from tqdm import tqdm

from aq_lightning.calibration import BlockCalibration
from aq_lightning.errors import RequestError
from aq_lightning.transforms import Affine
from callbacks import GradualMask, Progress

Fit = Callable[..., Path]
HEAD = 16  # channels of a head of the tiny model


def widths(module: BlockCalibration) -> list[int]:
    """Off-diagonals open on each side, of every affine matrix of a window."""
    masks = [part.mask for part in module.modules() if isinstance(part, Affine)]
    return [int((mask[0] != 0).sum()) - 1 for mask in masks]


@pytest.mark.parametrize("epochs, expected", [(1, [15]), (2, [0, 15]), (4, [0, 5, 10, 15])])
def test_mask_opens_by_the_schedule(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, expected: list[int]
) -> None:
    """In every step of every block, and anew for each block; what is stored is the last."""
    seen: dict[tuple[int, int], set[int]] = {}
    step = BlockCalibration.training_step

    def watch(self: BlockCalibration, batch, index):
        seen.setdefault((self.position.index, self.trainer.current_epoch), set()).update(widths(self))
        return step(self, batch, index)

    monkeypatch.setattr(BlockCalibration, "training_step", watch)
    run = fit("w4a16", tmp_path / "run", f"--trainer.max_epochs={epochs}")
    assert seen == {(block, epoch): {width} for block in (0, 1) for epoch, width in enumerate(expected)}
    for block in run.glob("blocks/*"):
        outcome = json.loads((block / "metrics.json").read_text())["outcome"]
        stored = load_file(block / "transforms.safetensors")
        (mask,) = (tensor for name, tensor in stored.items() if name.endswith("mask"))
        assert mask.shape == (HEAD, HEAD) and bool((mask != 0).all()) == (outcome == "trained")


def test_all_is_open_without_a_schedule(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    step = BlockCalibration.training_step

    def watch(self: BlockCalibration, batch, index):
        seen.update(widths(self))
        return step(self, batch, index)

    monkeypatch.setattr(BlockCalibration, "training_step", watch)
    (tmp_path / "open.yaml").write_text("[{class_path: callbacks.GradualMask, init_args: {schedule: none}}]")
    fit("w4a16", tmp_path / "run", f"--trainer.callbacks={tmp_path / 'open.yaml'}")
    assert seen == {HEAD - 1}


def test_shut_entries_stay_at_zero_effect(fit: Fit, tmp_path: Path) -> None:
    """Without the schedule nothing but the diagonal is ever trained."""
    names = [f"--trainer.callbacks+=callbacks.{name}" for name in ("DoublePrecisionCheckpoint",)]
    run = fit("w3a16g32", tmp_path / "run", "--trainer.callbacks=null", *names)
    stored = load_file(run / "blocks/0000/transforms.safetensors")
    (matrix,) = (tensor for name, tensor in stored.items() if name.endswith("matrix"))
    assert bool((matrix[:, ~torch.eye(HEAD, dtype=torch.bool)] == 0).all())
    assert not torch.equal(matrix[0].diagonal(), torch.ones(HEAD, dtype=torch.float64))


def test_mask_needs_the_last_epoch() -> None:
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=-1, logger=False, enable_checkpointing=False)
    with pytest.raises(RequestError, match="--trainer.max_epochs"):
        GradualMask().on_train_epoch_start(trainer, torch.nn.Module())


def test_ill_conditioned_transform_is_named(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "strict.yaml").write_text("[{class_path: callbacks.ConditionNumber, init_args: {warn_above: 1.01}}]")
    with pytest.warns(UserWarning) as caught:
        fit("w4a16", tmp_path / "run", f"--trainer.callbacks={tmp_path / 'strict.yaml'}")
    said = {str(each.message).partition(": condition number ")[0] for each in caught}
    assert said >= {"block 0, mlp_hidden", "block 1, value_output"}


def test_double_precision_checkpoint_loads_into_the_transforms(fit: Fit, tmp_path: Path) -> None:
    run = fit("w4a4", tmp_path / "run")
    stored = load_file(run / "blocks/0001/transforms.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float64}
    sites = {name.split(".")[2] for name in stored if name.startswith("0.transforms.")}
    assert sites == {"attention_input", "query_key", "value_output", "mlp_input", "mlp_hidden"}
    assert sum(name.startswith("0.quantizers.") for name in stored) == 14, "two ends of seven weights"
    log_scale = stored["0.transforms.mlp_hidden.factors.0.log_scale"]
    assert log_scale.shape == (1, 128) and not torch.equal(log_scale, log_scale.float().double()), "not rounded"


def test_progress_is_silent_without_a_terminal(fit: Fit, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    fit("w4a16", tmp_path / "run")
    assert capfd.readouterr().err == ""


def test_progress_counts_the_epochs_of_all_blocks(
    fit: Fit, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tuple[int, int]] = []
    start = Progress.on_fit_start

    def watch(self: Progress, trainer, module) -> None:
        start(self, trainer, module)
        bars.append((self.bar.n, self.bar.total))

    monkeypatch.setattr(Progress, "on_fit_start", watch)
    (tmp_path / "shown.yaml").write_text("[{class_path: callbacks.Progress, init_args: {show: true}}]")
    fit("w4a16", tmp_path / "run", f"--trainer.callbacks={tmp_path / 'shown.yaml'}", "--trainer.max_epochs=3")
    shown = capfd.readouterr().err
    assert bars == [(0, 6), (3, 6)], "one bar for both blocks"
    assert "block 2/2" in shown and "6/6" in shown and "epoch=3/3" in shown and "memory=" in shown
    assert "loss=" in shown and "loss=-" not in shown


def test_progress_shows_on_a_terminal() -> None:
    """tqdm decides by the stream that it writes to."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb"):
        assert not tqdm(total=1, disable=None, file=terminal).disable


def test_report_counts_steps_over_blocks(fit: Fit, tmp_path: Path) -> None:
    run = fit("w4a16", tmp_path / "run", "--trainer.max_epochs=3")
    with (run / "logs/version_0/metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == list(range(6))
    losses = [float(row["loss"]) for row in table]
    assert losses[1] != losses[0], "the loss of the epoch itself, not of the one before"
    assert losses[3] != losses[2]
