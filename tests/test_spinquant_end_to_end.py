"""Rotations learnt on the whole model before its blocks: once, durably, and what stands on them with them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file

from aq_lightning import rotating
from aq_lightning.calibration.learned_rotation import RotationFit
from aq_lightning.errors import RequestError
from aq_lightning.models.loading import load
from aq_lightning.transforms import Rotation, RotationTraining

SCHEME = "w4a4kv4sym"
SHORT = ["--model.rotation.training.steps=8", "--model.rotation.training.batch_size=4"]
TENSORS = ("rotation/rotation.safetensors", "blocks/0000/weights.safetensors", "blocks/0001/weights.safetensors")


@pytest.fixture(scope="module")
def run(fit: Callable[..., Path], tmp_path_factory) -> Path:
    return fit(
        SCHEME, tmp_path_factory.mktemp("spin") / "run", *SHORT, "--trainer.max_epochs=0", config="spinquant.yaml"
    )


@pytest.fixture
def again(fit: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return lambda *more: fit(SCHEME, tmp_path / "run", *SHORT, "--trainer.max_epochs=0", *more, config="spinquant.yaml")


def content(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in TENSORS]


def test_what_was_learnt(run: Path) -> None:
    tensors = load_file(run / "rotation/rotation.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "stream": (64, 64),
        "values": (2, 16, 16),
    }
    start = Rotation(training=RotationTraining())
    origin = {"stream": start(torch.eye(64)), "values": start.of_heads(2, 16)}
    for name, tensor in tensors.items():
        unit = torch.eye(tensor.shape[-1], dtype=torch.float64).expand_as(tensor)
        assert_close(name, unit, tensor @ tensor.mT, 1e-12)
        assert (tensor - origin[name]).norm() > 1e-2
    losses = json.loads((run / "rotation/metrics.json").read_text())
    assert losses["loss after"] < losses["loss before"] and losses["kept"] is True


def test_killed_inside_it_begins_anew_and_ends_in_the_same_bytes(
    run: Path, again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    step, seen = RotationFit.training_step, []

    def interrupted(module: RotationFit, batch: torch.Tensor, index: int) -> torch.Tensor:
        seen.append(index)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, index)

    monkeypatch.setattr(RotationFit, "training_step", interrupted)
    with pytest.raises(SystemExit) as exit:
        again()
    assert exit.value.code == os.EX_TEMPFAIL and len(seen) == 3 and not (tmp_path / "run/rotation").exists()
    assert "the same command goes on" in capsys.readouterr().err
    assert content(again()) == content(run) and len(seen) == 3 + 8


def test_taken_from_its_file_and_not_learnt_again(
    run: Path, again: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And blocks that stand on another one are made again."""
    place = again()
    for name in ("results.json", "checkpoint.json"):
        (place / name).unlink()
    kept = (place / "blocks/0000/weights.safetensors").stat().st_ino
    monkeypatch.setattr(RotationFit, "training_step", None)
    assert content(again()) == content(run)
    assert (place / "blocks/0000/weights.safetensors").stat().st_ino == kept
    monkeypatch.undo()
    (place / "rotation/rotation.safetensors").write_bytes(b"damaged")
    (place / "results.json").unlink()
    assert content(again()) == content(run), "made again, to the same bytes"
    assert (place / "blocks/0000/weights.safetensors").stat().st_ino == kept, "which block 0 can stand on"


def test_another_foundation_discards_the_blocks(again: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    place = again()
    before = content(place)
    (place / "results.json").unlink()
    (place / "rotation/rotation.safetensors").write_bytes(b"damaged")
    learned = RotationFit.learned
    monkeypatch.setattr(RotationFit, "learned", lambda module: learned(module).mirrored())
    monkeypatch.setattr("aq_lightning.transforms.LearnedRotation.mirrored", mirrored, raising=False)
    after = content(again())
    assert all(one != other for one, other in zip(before, after, strict=True))


def mirrored(rotation: object) -> object:
    return type(rotation)(rotation.stream.flip(1).contiguous(), rotation.values)


def test_by_the_divergence_from_full_precision(again: Callable[..., Path], run: Path) -> None:
    place = again("--model.rotation.training.objective=divergence")
    losses = json.loads((place / "rotation/metrics.json").read_text())
    assert 0 < losses["loss after"] < losses["loss before"]
    assert content(place)[0] != content(run)[0]


def test_what_is_no_better_is_not_kept(again: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    means = iter([1.0, float("nan")])
    monkeypatch.setattr(rotating.Rotating, "_mean", lambda *_: next(means))
    place = again()
    assert json.loads((place / "rotation/metrics.json").read_text())["kept"] is False
    stream = load_file(place / "rotation/rotation.safetensors")["stream"]
    assert_close("start", Rotation()(torch.eye(64)), stream, 1e-15)


def test_a_model_too_large_for_the_device_is_refused(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(str(model_directory))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**5, 10**6))
    with pytest.raises(RequestError, match="--model.rotation.training null"):
        rotating.check_memory(model, torch.device("cuda"), "Rotations are learnt", "set --model.rotation.training null")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    rotating.check_memory(model, torch.device("cuda"), "", "")


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch_size": 0}, {"rate": 0.0}, {"rate": float("inf")}])
def test_refused_plans(change: dict) -> None:
    with pytest.raises(RequestError, match="try 100 of 8 at 1.5"):
        RotationTraining(**change)
