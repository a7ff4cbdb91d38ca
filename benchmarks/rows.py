"""Rows of a table, each computed by a process of its own: several at once, within limits, and resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_GRACE = 15.0  # seconds from SIGTERM, at which a calibration saves where it is, to SIGKILL
_POLL = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Row:
    """A script that writes ``NAME.json`` when it is done; what it prints goes to ``NAME.log``."""

    name: str
    """Of its files."""
    task: Mapping[str, Any]
    """What the script is to do; it gets the path of a JSON file of this."""
    script: Path
    """It is called with that path and the path of the file to write."""
    path: Sequence[Path] = ()
    """Directories of packages that come before all others."""


@dataclass(frozen=True)
class Limits:
    """How much may run at once, and for how long."""

    processes: int = 1
    """At once."""
    minutes: float = math.inf
    """Of one row, all its attempts together, before it is given up."""
    seconds: float = math.inf
    """Of all rows, after which the same command goes on with what is left."""


@dataclass
class _Running:
    row: Row
    process: subprocess.Popen[bytes]
    before: float
    began: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.began


def work(rows: Sequence[Row], out: Path, limits: Limits) -> Iterator[tuple[Row, dict[str, Any] | str]]:
    """Computes the rows that ``out`` lacks, in order.

    Yields:
        Each row as it ends, with its result, or why there is none.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + limits.seconds
    left = [row for row in rows if result(row, out) is None]
    running: list[_Running] = []
    try:
        while (left or running) and time.monotonic() < deadline:
            while left and len(running) < limits.processes:
                row = left.pop(0)
                if _spent(row, out) > 60 * limits.minutes:
                    yield row, f"was given up after {_spent(row, out) / 60:.3g} minutes"
                else:
                    running.append(_start(row, out))
            for each in list(running):
                late = each.spent > 60 * limits.minutes
                if each.process.poll() is None and not late:
                    continue
                _stop([each], out)
                running.remove(each)
                why = f"given up after {limits.minutes:g} minutes" if late else f"failed: see {out / each.row.name}.log"
                yield each.row, result(each.row, out) or why
            time.sleep(_POLL)
    finally:
        _stop(running, out)


def result(row: Row, out: Path) -> dict[str, Any] | None:
    """What a finished row wrote, with the ``seconds`` that it took in all."""
    file = out / f"{row.name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2))
    partial.replace(file)


def _start(row: Row, out: Path) -> _Running:
    task = out / f"{row.name}.task"
    write(task, row.task)
    inherited = [Path(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    path = os.pathsep.join(str(each.resolve()) for each in [*row.path, ROOT, *inherited])
    with (out / f"{row.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(row.script), str(task), str(out / f"{row.name}.json")],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Running(row, process, _spent(row, out))


def _spent(row: Row, out: Path) -> float:
    """Seconds of the attempts that ended without a result."""
    file = out / f"{row.name}.spent"
    return float(file.read_text()) if file.is_file() else 0.0


def _stop(running: Sequence[_Running], out: Path) -> None:
    """Ends processes with all that they started, and notes the time that unfinished ones took."""
    for each in running:
        _signal(each, signal.SIGTERM)
    end = time.monotonic() + _GRACE
    for each in running:
        try:
            each.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(each, signal.SIGKILL)
            each.process.wait()
        if result(each.row, out) is None:
            (out / f"{each.row.name}.spent").write_text(str(each.spent))


def _signal(each: _Running, number: signal.Signals) -> None:
    if each.process.poll() is None:
        os.killpg(each.process.pid, number)
