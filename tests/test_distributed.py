"""Several processes with a share of the samples each end where one process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, relative_error
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from safetensors.torch import load_file

from aq_lightning import distributed, strategy, vigil
from aq_lightning.cli import main
from benchmarks.kill import digests, tiny_fit, tiny_model

TWO = ("--trainer.devices", "2")
TUNING = ("--model.tuning", '{"epochs": 2, "scales": 0.01, "norms": 0.01, "codes": 0.003, "written": 3}')
SIZES = (
    *TUNING,
    "--data.samples",
    "9",
    "--model.batch_size",
    "4",
    "--model.streams.dtype",
    "float32",
    "--report",
    "false",
)  # 5 samples and 4, and of what is written 1 and 2


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Arguments of ``train.py`` for a run directory and further options."""
    directory = tmp_path_factory.mktemp("distributed") / "model"
    tiny_model(directory)
    return lambda run, *more: tiny_fit(directory, *SIZES, "--save_every", "5", *more)(run)


def start(arguments: list[str]) -> subprocess.Popen:
    """``train.py``, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "TRITON_INTERPRET"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What a process says on its way out with ``code``."""
    try:
        said, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # of its session: all processes
        raise
    assert process.returncode == code, errors
    return errors if code else said


def wait_for(run: Path, pattern: str, process: subprocess.Popen) -> None:
    """Until the run directory has such a file, with the process still alive."""
    deadline = time.monotonic() + 120
    while not list(run.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def children(process: subprocess.Popen) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(each) for each in tasks]


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one process, and one of two, undisturbed."""
    place = tmp_path_factory.mktemp("runs")
    processes = start(command(place / "one")), start(command(place / "two", *TWO))
    for process in processes:
        finish(process)
    return place / "one", place / "two"


def test_two_processes_end_where_one_does(runs: tuple[Path, Path]) -> None:
    """Batches of 4 of 9 samples, the last with one, which only one process has. Losses of all candidates agree to 1e-4,
    learnt parameters to 2 % (where a gradient is nearly 0, Adam's steps are as long as elsewhere), words of ten codes
    in 99 %."""
    blocks = [json.loads((run / "results.json").read_text())["blocks"] for run in runs]
    for one, two in zip(*blocks, strict=True):
        assert two["candidates"].keys() == one["candidates"].keys() and two["outcome"] == one["outcome"]
        assert list(two["candidates"].values()) == pytest.approx(list(one["candidates"].values()), rel=1e-4)
        place = f"blocks/{one['block']:04d}"
        learnt, shared = (load_file(run / place / "transforms.safetensors") for run in runs)
        for name, value in learnt.items():
            assert relative_error(value, shared[name]) <= 0.02, name
        packed, other = (load_file(run / place / "weights.safetensors") for run in runs)
        for name in (name for name in packed if name.endswith("weight_packed")):
            assert (packed[name] != other[name]).float().mean() <= 0.01, name
    one, two = (json.loads((run / "results.json").read_text())["tuning"] for run in runs)
    assert one["divergence"] == pytest.approx(two["divergence"], rel=0.02) and one["outcome"] == two["outcome"]
    assert one["divergence"]["after"] < one["divergence"]["before"]
    assert json.loads((runs[1] / "fingerprint.json").read_text())["world size"] == "2"


def test_a_killed_process_ends_the_others_and_a_run_goes_on(command, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGKILL of the second process, within seconds; SIGTERM of the first makes a checkpoint; to the same bytes."""
    arguments = command(tmp_path / "run", *TWO)
    process = start(arguments)
    wait_for(tmp_path / "run", "inside/*[0-9]", process)
    (second,) = children(process)
    os.kill(second, signal.SIGKILL)
    began = time.monotonic()
    said = finish(process, os.EX_TEMPFAIL)
    assert time.monotonic() - began < 30
    assert said == "process 1 of 2 is gone; what is finished is safe: the same command goes on.\n"
    process = start(arguments)
    wait_for(tmp_path / "run", "blocks/0000", process)
    wait_for(tmp_path / "run", "inside", process)
    process.send_signal(signal.SIGTERM)
    said = finish(process, os.EX_TEMPFAIL)
    assert said.startswith("stopped by SIGTERM") and len(said.splitlines()) == 1
    finish(start(arguments))
    assert digests(tmp_path / "run") == digests(runs[1])


def test_the_launcher_no_longer_kills_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it does as soon as it finds another gone, so that nobody hears what the vigil says of it."""
    killed: list[tuple[int, int]] = []
    gone = subprocess.Popen(["false"])
    gone.wait()
    observer = _ChildProcessObserver(os.getpid(), [gone], sleep_period=1)
    monkeypatch.setattr(os, "kill", lambda *given: killed.append(given))
    observer.start()
    vigil._relieve()
    observer.join(timeout=10)
    assert not observer.is_alive() and killed == []


def test_another_number_of_processes_is_refused(
    command, runs: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(command(runs[1]))
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert "got 1 for" in said and "which began with 2: set --trainer.devices times --trainer.num_nodes to 2" in said


@pytest.mark.parametrize(
    "options, fix",
    [
        (("--trainer.devices", "8"), "set --model.batch_size to a multiple of 8"),
        ((*TWO, "--model.tuning.batch_size", "3"), "set --model.batch_size and --model.tuning.batch_size to multiples"),
        ((*TWO, "--trainer.accumulate_grad_batches", "2"), "leave it at 1, and raise --model.batch_size"),
        ((*TWO, "--trainer.strategy", "ddp_spawn"), "set --trainer.strategy ddp"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    command, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, options, fix: str
) -> None:
    check = partial(strategy.check_start, called=False)
    monkeypatch.setattr("aq_lightning.commandline.check_start", lambda given, _: check(given))  # as from a shell
    with pytest.raises(SystemExit) as exit:
        main(command(tmp_path / "run", *options))
    assert exit.value.code == 2 and fix in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_unequal_parts_have_the_mean_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over two processes with 3 samples and 1, of which the second is simulated."""
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(
        distributed, "add_up", lambda tensors: [each.add_(torch.tensor([10.0, 1.0])) for each in tensors]
    )
    assert float(distributed.mean(torch.tensor([1.0, 2.0, 3.0]))) == 4.0
