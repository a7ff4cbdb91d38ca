"""The law: a run killed at any instants ends in the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from aq_lightning.cli import main
from aq_lightning.status import status_of
from benchmarks import kill
from benchmarks.kill import Nursery, digests, kill_until_done, tiny_model


def tiny_fit(directory: Path, *more: str) -> Callable[[Path], list[str]]:
    """``fit`` of the tiny model without a report, which nothing here reads and which takes longer than all else."""
    return kill.tiny_fit(directory, "--report", "false", *more)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kill") / "model"
    tiny_model(place)
    return place


@pytest.fixture(scope="module")
def nursery(directory: Path) -> Iterator[Nursery]:
    with Nursery(directory / "log") as nursery:
        yield nursery


@pytest.fixture(scope="module")
def fit(directory: Path, nursery: Nursery) -> Callable[..., dict[str, str]]:
    """Bytes of an uninterrupted run with further arguments."""

    def run(place: Path, *more: str) -> dict[str, str]:
        assert nursery.run(tiny_fit(directory, *more)(place)).status == 0
        return digests(place)

    return run


WRITTEN = ("--model.tuning", '{"epochs": 1, "scales": 0.01, "norms": 0.01, "codes": 0.003, "written": 3}')


@pytest.mark.parametrize(
    "options", [(), ("--keep_streams", "false", "--save_every", "2"), WRITTEN], ids=["kept", "recomputed", "written"]
)
def test_killed_at_random_instants(nursery: Nursery, directory: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """35 kills in all: at a write (cut in half), a sync, a rename, a step, or whenever the clock says."""
    kills = 15 if not options else 10
    *_, counts = kill_until_done(nursery, tiny_fit(directory, *options), tmp_path, kills, seed=len(options))
    assert counts["OTHER BYTES"] == 0 and counts["same bytes"] >= 1
    assert counts["kills by event"] + counts["kills by clock"] >= kills


def test_the_comparison_can_fail(fit, tmp_path: Path) -> None:
    """Negative control; nor do the ways of going on, or how often checkpoints are made, touch the result."""
    plain = fit(tmp_path / "plain", "--save_every", "0", "--keep_streams", "false")
    assert fit(tmp_path / "guarded") == plain
    assert fit(tmp_path / "other", "--data.seed", "43") != plain


STEP_BEFORE_THE_END = {
    "constant steps": ("--model.decay", "none"),
    "two blocks in a window": ("--model.plan.size", "2"),
    "one batch to an epoch": ("--model.batch_size", "8"),
    "attempts that diverge": ("--model.learning_rates.clipping", "1e6"),
    "plain gradients added up": ("--trainer.accumulate_grad_batches", "2"),
}


@pytest.mark.parametrize("case", list(STEP_BEFORE_THE_END))
def test_killed_late_in_a_block(nursery: Nursery, directory: Path, fit, tmp_path: Path, case: str) -> None:
    """Killed thrice inside blocks, with other schedules."""
    options = STEP_BEFORE_THE_END[case]
    expected = fit(tmp_path / "reference", *options)
    command = tiny_fit(directory, *options)(tmp_path / "run")
    dice = random.Random(case)
    lives = [nursery.run(command, event=dice.randrange(60, 160)).status for _ in range(3)]
    assert lives[0] == -signal.SIGKILL
    assert nursery.run(command).status == 0
    assert digests(tmp_path / "run") == expected


@pytest.mark.parametrize("streams", ["true", "false"], ids=["kept", "recomputed"])
def test_killed_while_scales_are_tuned(nursery: Nursery, directory: Path, tmp_path: Path, streams: str) -> None:
    """Thrice, counted from the end of an undisturbed run: before, in and behind the checkpoints of the tuning."""
    options = (
        "--model.tuning",
        json.dumps({"epochs": 3, "scales": 0.01, "norms": 0.01, "codes": 0.01}),
        "--keep_streams",
        streams,
    )
    command = tiny_fit(directory, *options)
    reference = nursery.run(command(tmp_path / "reference"))
    expected, seen = digests(tmp_path / "reference"), []
    for before_the_end in (150, 135, 120):
        run = tmp_path / f"run-{before_the_end}"
        assert nursery.run(command(run), event=reference.events - before_the_end).status == -signal.SIGKILL
        seen += [path.name for path in run.glob("inside/9999.*")]
        assert nursery.run(command(run)).status == 0
        assert digests(run) == expected
    assert seen and "block of all" in expected


def start(command: list[str], directory: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "train.py", *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(run: Path, pattern: str, process: subprocess.Popen) -> None:
    """Until the run directory has such a file, with the process still alive."""
    deadline = time.monotonic() + 120
    while not list(run.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_real_processes(directory: Path, nursery: Nursery, fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A second process is refused; SIGTERM makes a checkpoint, says so and exits with 75; SIGKILL; on to the end."""
    options = ("--trainer.max_epochs", "40", "--save_every", "0")
    expected = fit(tmp_path / "reference", *options)
    command = tiny_fit(directory, *options)(tmp_path / "run")
    process = start(command, directory)
    wait_for(tmp_path / "run", "now.json", process)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(SystemExit) as exit:
        main(command)
    assert exit.value.code == 2 and f"belongs to process {process.pid} on " in capsys.readouterr().err
    assert f"at work: process {process.pid} on " in status_of(tmp_path / "run")
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == os.EX_TEMPFAIL
    assert said.startswith("stopped by SIGTERM behind step ") and said.endswith("goes on from there.\n"), said
    assert len(said.splitlines()) == 1 and len(list((tmp_path / "run/inside").iterdir())) == 1
    process = start([*command, "--resume", "must"], directory)
    wait_for(tmp_path / "run", "blocks/0000", process)
    process.kill()
    process.communicate()
    assert nursery.run(command).status == 0
    assert digests(tmp_path / "run") == expected
