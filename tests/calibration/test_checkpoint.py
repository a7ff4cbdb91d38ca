"""A run directory never shows half a block, and never believes a damaged one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from aq_lightning import durable
from aq_lightning.calibration import Keeper, RunDirectory, Streams, checkpoint
from aq_lightning.errors import RequestError
from aq_lightning.wording import changed_lines

CONFIG = "model:\n  scheme: w4a16\n  batch_size: 4\n"
FINGERPRINT = {"model config.json": "90 bytes", "torch": "2.13.0", "device": "cpu"}
WEIGHTS = {"w": torch.arange(6, dtype=torch.float16)}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.check(tmp_path / "run", CONFIG)
    assert not run.path.exists(), "checking writes nothing"
    run.lock()
    run.create(CONFIG, FINGERPRINT)
    return run


def commit(run: RunDirectory, block: int, **weights: torch.Tensor) -> None:
    (run.scratch(block) / "transforms.safetensors").write_bytes(b"learnt")
    run.put(block, weights or WEIGHTS)
    assert torch.equal(run.weights(block)["w"], (weights or WEIGHTS)["w"]) and not run.finished(block)
    run.commit(block, {"block": block, "loss": 0.5})


def again(run: RunDirectory) -> tuple[RunDirectory, list[str]]:
    """What another process finds."""
    other = RunDirectory.check(run.path, CONFIG)
    return other, other.repair()


def streams(value: float) -> Streams:
    return Streams(full=torch.full((2, 3, 4), value), quantized=torch.full((2, 3, 4), -value))


def test_committed_block_is_whole(run: RunDirectory) -> None:
    assert not run.finished(0)
    commit(run, 0)
    assert run.finished(0) and not run.finished(7)
    assert torch.equal(run.weights(0)["w"], WEIGHTS["w"])
    assert [path.name for path in sorted(run.path.glob("blocks/*"))] == ["0000"]
    assert (run.path / "blocks/0000/transforms.safetensors").read_bytes() == b"learnt"
    commit(run, 7)
    assert [each["block"] for each in run.all_metrics()] == [0, 7]


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_failure_at_any_call_inside_commit_leaves_no_block(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    original, failures = getattr(os, function), 0
    for count in range(1, 100):
        left = [count]

        def fail(*arguments: object, left: list[int] = left) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            try:
                commit(run, 0)
                break
            except OSError:
                failures += 1
        other, _ = again(run)
        if (run.path / "blocks/0000").exists():  # the last syncs come after the rename
            assert other.finished(0) and function == "fsync"
        else:
            assert not other.finished(0) and other.all_metrics() == []
    assert failures >= 3
    other, damaged = again(run)
    assert other.finished(0) and not damaged and not list(run.path.glob("blocks/*.partial"))


def test_scratch_starts_empty(run: RunDirectory) -> None:
    (run.scratch(3) / "left over").touch()
    assert not list(run.scratch(3).iterdir())


@pytest.mark.parametrize("file", ["weights.safetensors", "transforms.safetensors", "metrics.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["cut", "flipped", "gone"])
def test_damaged_block_is_named_and_removed(run: RunDirectory, file: str, kind: str) -> None:
    commit(run, 0)
    commit(run, 1)
    path = run.path / "blocks/0001" / file
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:3] if kind == "cut" else bytes([content[0], content[1] ^ 4]) + content[2:])
    other, damaged = again(run)
    assert damaged == ["block 0001"] and not (run.path / "blocks/0001").exists()
    assert other.finished(0) and not other.finished(1)


@pytest.mark.parametrize("same", [True, False])
def test_blocks_behind_one_that_is_made_again_stay_only_if_it_is_the_same(run: RunDirectory, same: bool) -> None:
    for block in (0, 1, 2):
        commit(run, block, w=torch.full((2,), float(block)))
    (run.path / "blocks/0001/weights.safetensors").unlink()
    other, _ = again(run)
    assert other.finished(0) and not other.finished(1)
    commit(other, 1, w=torch.full((2,), 1.0 if same else 5.0))
    assert other.finished(2) is same
    assert (run.path / "blocks/0002").exists() is same


def keep(run: RunDirectory, block: int, streams: Streams) -> None:
    with Keeper(run) as keeper:
        keeper.keep(block, streams)


def test_streams_are_kept_for_the_window_at_work_alone(run: RunDirectory) -> None:
    assert run.kept([0, 1, 2]) is None
    for block in (0, 1):
        commit(run, block)
        keep(run, block + 1, streams(block + 1.0))
        assert [path.name for path in (run.path / "streams").iterdir()] == [f"{block + 1:04d}"]
    other, _ = again(run)
    start, found = other.kept([0, 1, 2])
    assert start == 2 and torch.equal(found.full, streams(2.0).full)
    assert torch.equal(found.quantized, streams(2.0).quantized)


def test_streams_that_are_damaged_or_behind_other_blocks_are_not_used(run: RunDirectory) -> None:
    commit(run, 0)
    keep(run, 1, streams(1.0))
    (run.path / "blocks/0000/weights.safetensors").unlink()
    other, _ = again(run)
    assert other.kept([0, 1]) is None, "block 0 is made again first"
    commit(other, 0, w=torch.zeros(1))
    assert other.kept([0, 1]) is None, "these streams came out of another block 0"
    keep(other, 1, streams(3.0))
    file = run.path / "streams/0001/streams.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert other.kept([0, 1]) is None


def test_streams_are_written_while_the_window_is_at_work(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before stay until the new ones are whole; what goes wrong is raised, and nothing is half there."""
    begun, go_on, write = Event(), Event(), durable.save_tensors

    def slow(path: Path, tensors: Mapping[str, Tensor]) -> None:
        begun.set()
        assert go_on.wait(20)
        write(path, tensors)

    commit(run, 0)
    with Keeper(run) as keeper:
        keeper.keep(1, streams(1.0))
        keeper.finish()
        commit(run, 1)
        monkeypatch.setattr(checkpoint, "save_tensors", slow)
        keeper.keep(2, streams(2.0))
        assert begun.wait(20)
        assert run.kept([0, 1, 2])[0] == 1
        go_on.set()
    assert again(run)[0].kept([0, 1, 2])[0] == 2
    assert [path.name for path in (run.path / "streams").iterdir()] == ["0002"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"), Keeper(run) as keeper:
        keeper.keep(2, streams(3.0))
    assert not list((run.path / "streams").iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_of_a_gpu_are_written_beside_its_work(run: RunDirectory) -> None:
    """What was asked of the device before is in them; what is asked of it then is not waited for."""
    commit(run, 0)
    with Keeper(run) as keeper:
        given = Streams(*(each.cuda() for each in streams(2.0).tensors().values()))
        before, after = torch.cuda.Event(), torch.cuda.Event()
        torch.cuda._sleep(10**9)  # cycles: half a second at least
        more = given.full + 1
        before.record()
        keeper.keep(1, Streams(more, given.quantized))
        assert not before.query(), "nobody waits for what they are made of"
        torch.cuda._sleep(10**10)
        after.record()
        keeper.finish()
        assert before.query() and not after.query(), "they are on the disk before the work behind them is done"
    torch.cuda.synchronize()
    _, found = again(run)[0].kept([0, 1])
    assert torch.equal(found.full, streams(2.0).full + 1) and torch.equal(found.quantized, streams(2.0).quantized)


def test_damaged_result_is_removed(run: RunDirectory) -> None:
    for damage in (True, False):
        run.checkpoint.mkdir()
        durable.save_tensors(run.checkpoint / "model.safetensors", WEIGHTS)
        if damage:  # killed between the two
            other, damaged = again(run)
            assert damaged == ["checkpoint"] and not run.checkpoint.exists()
    run.seal_checkpoint()
    run.finish({"rows": [1]})
    assert RunDirectory.check(run.path, CONFIG).results == {"rows": [1]}
    (run.checkpoint / "model.safetensors").write_bytes(b"half")
    assert RunDirectory.check(run.path, CONFIG).results is None
    assert again(run)[1] == ["checkpoint"]


def test_damaged_table_is_no_table(run: RunDirectory) -> None:
    run.checkpoint.mkdir()
    run.seal_checkpoint()
    run.finish({"rows": [1]})
    path = run.path / "results.json"
    path.write_text(path.read_text().replace("1\n", "2\n"))
    assert json.loads(path.read_text())["rows"] == [2] and run.results is None


def test_another_configuration_is_named(run: RunDirectory) -> None:
    with pytest.raises(RequestError, match=r"- scheme: w4a16; \+ scheme: w3a16\): choose another --out"):
        RunDirectory.check(run.path, CONFIG.replace("w4a16", "w3a16"))
    with pytest.raises(RequestError, match=r"\+ cosine: true"):
        RunDirectory.check(run.path, CONFIG + "  cosine: true\n")


def test_another_fingerprint_is_named(run: RunDirectory) -> None:
    other = RunDirectory.check(run.path, CONFIG)
    other.check_fingerprint(FINGERPRINT)
    changed = {"model config.json": "90 bytes", "torch": "2.14.0", "device": "cuda", "world size": "2"}
    differ = r"differ \(device: cpu → cuda; torch: 2\.13\.0 → 2\.14\.0; world size: none → 2\): restore them"
    with pytest.raises(RequestError, match=differ):
        other.check_fingerprint(changed)
    (run.path / "fingerprint.json").write_text("{")
    with pytest.raises(RequestError, match="missing or damaged"):
        other.check_fingerprint(FINGERPRINT)


def test_resume_must_and_never(run: RunDirectory, tmp_path: Path) -> None:
    RunDirectory.check(run.path, CONFIG, "must")
    RunDirectory.check(tmp_path / "new", CONFIG, "never")
    with pytest.raises(RequestError, match=r"--resume must goes on with a run, got .*new.*holds none"):
        RunDirectory.check(tmp_path / "new", CONFIG, "must")
    with pytest.raises(RequestError, match=r"--resume never begins in a new place, got .*run.*holds a run"):
        RunDirectory.check(run.path, CONFIG, "never")


def test_killed_while_the_directory_was_made(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("lock", "fingerprint.json", "config.yaml.partial"):
        (tmp_path / "run" / name).touch()
    run = RunDirectory.check(tmp_path / "run", CONFIG)
    run.create(CONFIG, FINGERPRINT)
    RunDirectory.check(run.path, CONFIG).check_fingerprint(FINGERPRINT)


def test_changes() -> None:
    assert changed_lines("a: 1\nb: 2\nc: 3\n", "a: 1\nb: 9\nc: 3\n") == ["- b: 2", "+ b: 9"]
    assert changed_lines("a: 1\n", "a: 1\n") == []
    assert changed_lines("a:\n- x\n", "a:\n- x\n- y\n") == ["+ - y"]
