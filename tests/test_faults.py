"""Faults from outside: nothing that was finished is lost, and the same command goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aq_lightning.calibration import BlockCalibration, LiveWindow, RunDirectory, streams
from aq_lightning.cli import main
from aq_lightning.data import check_windows
from aq_lightning.durable import manifest
from aq_lightning.errors import RequestError
from aq_lightning.status import status_of
from benchmarks.kill import digests

Fit = Callable[..., Path]
EVERY = ("--save_every=1", "--trainer.logger=false")


@pytest.fixture(scope="module")
def expected(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Bytes of an undisturbed run."""
    return digests(fit("w4a16", tmp_path_factory.mktemp("undisturbed") / "run", *EVERY))


def interrupted(fit: Fit, run: Path, capsys: pytest.CaptureFixture, *more: str) -> str:
    """The sentence of a run that stops and can go on."""
    with pytest.raises(SystemExit) as exit:
        fit("w4a16", run, *EVERY, *more)
    said = capsys.readouterr().err
    assert exit.value.code == os.EX_TEMPFAIL and "Traceback" not in said and len(said.splitlines()) == 1, said
    return said


def goes_on(fit: Fit, run: Path, expected: dict[str, str], *more: str) -> None:
    assert digests(fit("w4a16", run, *EVERY, *more)) == expected
    assert not [path for path in run.rglob("*") if "partial" in path.name], "no scratch is left"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_writes_fail_again_and_again(
    fit: Fit, expected, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A write fails in one life after another, each time a later one; the disk takes half of it."""
    original, left = os.write, [0]

    def fail(descriptor: int, content) -> int:
        left[0] -= 1
        if left[0] == 0:
            original(descriptor, content[: len(content) // 2])
            raise OSError(error, os.strerror(error))
        return original(descriptor, content)

    failures = 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        for place in range(1, 4000, 23):
            left[0] = place
            try:
                fit("w4a16", tmp_path / "run", *EVERY)
                break
            except SystemExit as exit:
                said = capsys.readouterr().err
                assert exit.code == os.EX_TEMPFAIL and os.strerror(error) in said and "the same command goes on" in said
                failures += 1
    assert failures >= 4
    goes_on(fit, tmp_path / "run", expected)


@pytest.mark.parametrize("limit", [2_000, 30_000, 60_000])
def test_files_cannot_grow(fit: Fit, expected, tmp_path: Path, capsys: pytest.CaptureFixture, limit: int) -> None:
    """A quota of the operating system, which holds for every writer in the process."""
    fit("w4a16", tmp_path / "warm", *EVERY)  # windows are cached
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        said = interrupted(fit, tmp_path / "run", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in said
    goes_on(fit, tmp_path / "run", expected)


def test_no_room(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(SystemExit) as exit:
        fit("w4a16", tmp_path / "run")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "needs room, got 1.0 MB free" in said and "--keep_streams false" in said
    assert not (tmp_path / "run").exists()


def test_directory_that_cannot_be_made(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that is mounted read-only says so only when it is written."""
    original = Path.mkdir

    def refuse(path: Path, *arguments, **options) -> None:
        if path == tmp_path / "run":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        original(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit) as exit:
        fit("w4a16", tmp_path / "run")
    assert exit.value.code == 2 and "must be writable" in capsys.readouterr().err


def test_estimated_disk_use_is_an_upper_bound(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = [0]
    original = os.replace

    def watch(*arguments) -> None:
        original(*arguments)
        here = (path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
        most[0] = max(most[0], sum(here))

    monkeypatch.setattr(os, "replace", watch)
    fit("w4a16", tmp_path / "run", *EVERY)
    said = capsys.readouterr().out.splitlines()[0]
    assert 0 < most[0] < float(said.split()[4]) * 1e6 and " MB (result " in said


@pytest.mark.filterwarnings("ignore:block .{1,2} out of memory")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gpu_out_of_memory(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, where: str
) -> None:
    """Micro-batches of 1 instead of 4: the same result up to the order of sums."""
    whole = load_file(fit("w4a16", tmp_path / "whole", *EVERY) / "blocks/0000/transforms.safetensors")
    forward, sizes = BlockCalibration.forward, set()

    def limited(module: BlockCalibration, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > 1 and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.add(len(hidden))
        answer = forward(module, hidden)
        if len(hidden) > 1:
            answer.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        return answer

    monkeypatch.setattr(BlockCalibration, "forward", limited)
    parts = load_file(fit("w4a16", tmp_path / "parts", *EVERY) / "blocks/0000/transforms.safetensors")
    assert 1 in sizes
    said = [str(each.message) for each in recwarn if "out of memory" in str(each.message)]
    for text, size in zip(said, (4, 2), strict=False):
        assert text.startswith(f"block 0: out of memory with {size} windows of text at once; going on with {size // 2}")
    for name, tensor in whole.items():
        assert (tensor - parts[name]).abs().max() <= 2e-3 * max(1.0, float(tensor.abs().max())), name


def test_gpu_out_of_memory_with_one_window(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BlockCalibration, "forward", full)
    with pytest.raises(SystemExit) as exit, pytest.warns(UserWarning, match="out of memory"):
        fit("w4a16", tmp_path / "run")
    assert exit.value.code == 2 and "lower data.length" in capsys.readouterr().err
    monkeypatch.setattr(LiveWindow, "run", full)
    assert "out of memory" in interrupted(fit, tmp_path / "other", capsys)


def test_passes_halve_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def block(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden + 1

    stream = torch.arange(7.0).reshape(7, 1, 1)
    assert torch.equal(streams.run([block], [{}], stream, 7, torch.device("cpu")), stream + 1)
    assert seen == [7, 4, 2, 2, 2, 1]


def test_data_source_dies_during_a_run(
    fit: Fit, expected, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has its windows; a process that goes on needs the source again, to know that it is the same."""
    book = tmp_path / "book.txt"
    shutil.copy(text_file, book)
    step = BlockCalibration.training_step

    def burn(*arguments) -> torch.Tensor:
        book.unlink(missing_ok=True)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BlockCalibration, "training_step", burn)
        assert digests(fit("w4a16", tmp_path / "alone", *EVERY, f"--data.source={book}")) == expected
    shutil.copy(text_file, book)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "dead")))
        interrupted(fit, tmp_path / "run", capsys, f"--data.source={book}")
    book.write_text("word1 " + text_file.read_text())
    for said in ("calibration tokens: 8 × 32, sha256 ", "which is neither"):
        with pytest.raises(SystemExit) as exit:
            fit("w4a16", tmp_path / "run", *EVERY, f"--data.source={book}")
        assert exit.value.code == 2 and said in capsys.readouterr().err
        book.unlink(missing_ok=True)
    shutil.copy(text_file, book)
    goes_on(fit, tmp_path / "run", expected, f"--data.source={book}")


def test_the_model_changes_between_lives(
    fit: Fit, model_directory: Path, expected, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    model = Path(shutil.copytree(model_directory, tmp_path / "model"))
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "dead")))
        interrupted(fit, tmp_path / "run", capsys, f"--model.pretrained={model}")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(SystemExit) as exit:
        fit("w4a16", tmp_path / "run", *EVERY, f"--model.pretrained={model}")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "where these differ (model model.safetensors: " in said


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_the_clock_jumps(fit: Fit, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """No decision looks at the wall clock."""
    now, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return now() + jump * (calls[0] % 2)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        patch.setattr(RunDirectory, "finish", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            fit("w4a16", tmp_path / "run", *EVERY)
        for path in (tmp_path / "run").rglob("*"):
            os.utime(path, (now() + jump, now() + jump))
    monkeypatch.setattr(time, "time", jumping)
    goes_on(fit, tmp_path / "run", expected)


@pytest.mark.parametrize("file", ["blocks/0000/weights.safetensors", "checkpoint/model.safetensors", "results.json"])
def test_a_finished_run_is_damaged(
    fit: Fit, expected, tmp_path: Path, capsys: pytest.CaptureFixture, file: str
) -> None:
    """What the result needs is made again; a block's own file is not needed any more."""
    run = fit("w4a16", tmp_path / "run", *EVERY)
    content = bytearray((run / file).read_bytes())
    content[len(content) // 2] ^= 8
    (run / file).write_bytes(content)
    capsys.readouterr()
    goes_on(fit, run, {**expected, **({file: digests(run)[file]} if "blocks" in file else {})})
    said = capsys.readouterr().out
    assert ("is finished" in said) == ("blocks" in file)
    assert ("damaged, and made again: checkpoint" in said) == ("checkpoint" in file)


@pytest.mark.parametrize(
    "windows, said",
    [
        (torch.zeros(2, 8), "int64"),
        (torch.zeros(2, 8, dtype=torch.int32), "int64"),
        (torch.zeros(8, dtype=torch.int64), r"shape \(8,\)"),
        (torch.zeros(0, 8, dtype=torch.int64), r"shape \(0, 8\)"),
        (torch.full((2, 8), 96), "96"),
        (torch.full((2, 8), -1), "-1"),
    ],
)
def test_samples_of_another_kind(windows: torch.Tensor, said: str) -> None:
    check_windows(torch.full((2, 8), 95), 96)
    with pytest.raises(RequestError, match=said):
        check_windows(windows, 96)


def test_status(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, commit = [], RunDirectory.commit

    def look(run: RunDirectory, *arguments) -> None:
        commit(run, *arguments)
        seen.append(status_of(run.path))

    monkeypatch.setattr(RunDirectory, "commit", look)
    run = fit("w4a16", tmp_path / "run", *EVERY)
    assert f"at work: process {os.getpid()} on " in seen[0] and "1 of 2 done" in seen[0]
    assert "block 0, epoch 2 of 2, step 4, loss " in seen[0] and "time left" in seen[0] and "w4a16" in seen[0]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["status", str(run)])
    said = capsys.readouterr().out
    assert exit.value.code == 0 and "finished" in said and "2 done" in said and len(said.splitlines()) <= 24
    with pytest.raises(SystemExit) as exit:
        main(["status", str(tmp_path)])
    assert exit.value.code == 2 and "holds config.yaml" in capsys.readouterr().err


def test_resume_must_and_never(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for resume, existing in (("must", False), ("never", True)):
        with pytest.raises(SystemExit) as exit:
            fit("w4a16", tmp_path / "run", *EVERY, f"--resume={resume}")
        assert exit.value.code == 2 and f"--resume {resume}" in capsys.readouterr().err
        assert (tmp_path / "run").exists() == existing
        fit("w4a16", tmp_path / "run", *EVERY, "--resume=auto")
        capsys.readouterr()


def test_every_step_inside_is_sealed_and_loads_without_pickle(fit: Fit, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(RunDirectory, "commit", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        fit("w4a16", tmp_path / "run", *EVERY)
    (place,) = (tmp_path / "run/inside").iterdir()
    assert manifest(place) is not None and place.name == "0000.0.00000004"
    state = torch.load(place / "state.ckpt", weights_only=True)
    assert state["state_dict"]["blocks.0.transforms.value_output.factors.1.matrix"].dtype == torch.float64
    assert not [name for name in state["state_dict"] if ".block." in name], "the frozen block is not in it"
    assert json.dumps(sorted(state["random"])) == '["cuda", "numpy", "python", "torch"]'
