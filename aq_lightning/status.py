"""Where a run stands, on one screen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import yaml

from aq_lightning.calibration import RunDirectory
from aq_lightning.errors import RequestError
from aq_lightning.wording import duration


def status_of(path: Path) -> str:
    """A few lines that say what is done, what is at work and how much time is left.

    Raises:
        RequestError: no run is there.
    """
    if not (path / "config.yaml").is_file():
        raise RequestError(f"A run's directory holds config.yaml, got {str(path)!r}, which does not: name another.")
    run = RunDirectory(path)
    owner = run.lock_file.owner()
    done, now = run.all_metrics(), run.at_work()
    finished = run.results is not None
    files = list(_stats(path))
    lines = {
        "run": f"{path} ({_named(path)})",
        "state": "finished" if finished else f"at work: {owner}" if owner else "stopped; the same command goes on",
        "windows": f"{len(done)} done" if now is None else f"{len(done)} of {now['windows']} done",
        "losses": ", ".join(f"{each['block']}: {each['loss']:.3g}" for each in done[-8:]),
        "disk": f"{sum(file.st_size for file in files) / 1e6:.1f} MB",
        "last write": f"{duration(max(0.0, time.time() - max(file.st_mtime for file in files)))} ago",
    }
    if now is not None and not finished:
        lines["now"] = (f"{now['place']}, epoch {now['epoch'] + 1} of {now['epochs']}, step {now['step']}, "
                        f"loss {now['loss']:.3g}")  # fmt: skip
        lines["time left"] = _left(done, now)
    return "\n".join(f"{name:<11}{value}" for name, value in lines.items() if value)


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of every file that is still there when it is looked at."""
    for directory, _, files in os.walk(path):  # which passes over directories that go
        for file in files:
            with suppress(FileNotFoundError):
                yield os.stat(os.path.join(directory, file))


def _named(path: Path) -> str:
    """Model and scheme of the configuration."""
    try:
        model = yaml.safe_load((path / "config.yaml").read_text())["model"]
        return f"{model['pretrained']}, {model['scheme']}"
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return "its config.yaml cannot be read"


def _left(done: list[dict], now: dict) -> str:
    """From the mean time of the finished windows, less the share of epochs done in the one at work; may be empty."""
    if not done:
        return "known after the first window"
    if len(done) == now["windows"]:  # what follows for the whole model
        return ""
    rest = now["windows"] - len(done) - min(1.0, (now["epoch"] + 1) / max(now["epochs"], 1))
    return duration(max(0.0, rest) * sum(each["seconds"] for each in done) / len(done))
