"""A run directory never shows half a block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aq_lightning.calibration import RunDirectory, checkpoint
from aq_lightning.errors import RequestError

CONFIG = "model:\n  scheme: w4a16\n  batch_size: 4\n"
WEIGHTS = {"w": torch.arange(6, dtype=torch.float16)}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.check(tmp_path / "run", CONFIG)
    assert not run.path.exists(), "checking writes nothing"
    run.create(CONFIG)
    return run


def commit(run: RunDirectory, block: int) -> None:
    (run.scratch(block) / "transforms.safetensors").write_bytes(b"learnt")
    run.commit(block, WEIGHTS, {"block": block, "loss": 0.5})


def test_committed_block_is_whole(run: RunDirectory) -> None:
    assert not run.finished(7)
    commit(run, 7)
    assert run.finished(7) and not run.finished(0)
    assert torch.equal(run.weights(7)["w"], WEIGHTS["w"])
    assert [path.name for path in sorted(run.path.glob("blocks/*"))] == ["0007"]
    assert (run.path / "blocks/0007/transforms.safetensors").read_bytes() == b"learnt"
    commit(run, 0)
    assert [each["block"] for each in run.all_metrics()] == [0, 7]


@pytest.mark.parametrize("function", ["save_file", "_write", "_sync"])
def test_crash_inside_commit_leaves_no_block(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, fail)
        with pytest.raises(OSError, match="disk full"):
            commit(run, 0)
    assert not run.finished(0) and run.all_metrics() == []
    commit(run, 0)
    assert run.finished(0) and not list(run.path.glob("blocks/*.partial"))


def test_scratch_starts_empty(run: RunDirectory) -> None:
    (run.scratch(3) / "left over").touch()
    assert not list(run.scratch(3).iterdir())


def test_same_configuration_goes_on(run: RunDirectory) -> None:
    commit(run, 0)
    again = RunDirectory.check(run.path, CONFIG)
    again.create(CONFIG)
    assert again.finished(0) and again.results is None
    again.finish({"rows": [1]})
    assert RunDirectory.check(run.path, CONFIG).results == json.loads((run.path / "results.json").read_text())


def test_another_configuration_is_named(run: RunDirectory) -> None:
    with pytest.raises(RequestError, match=r"- scheme: w4a16; \+ scheme: w3a16\): choose another --out"):
        RunDirectory.check(run.path, CONFIG.replace("w4a16", "w3a16"))
    with pytest.raises(RequestError, match=r"\+ cosine: true"):
        RunDirectory.check(run.path, CONFIG + "  cosine: true\n")


def test_changes() -> None:
    assert checkpoint._changes("a: 1\nb: 2\nc: 3\n", "a: 1\nb: 9\nc: 3\n") == ["- b: 2", "+ b: 9"]
    assert checkpoint._changes("a: 1\n", "a: 1\n") == []
    assert checkpoint._changes("a:\n- x\n", "a:\n- x\n- y\n") == ["+ - y"]
