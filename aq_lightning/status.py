"""Where a run stands, on one screen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from aq_lightning.calibration import Cause, RunDirectory
from aq_lightning.errors import RequestError
from aq_lightning.evaluation import Row, render


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
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    lines = {
        "run": f"{path} ({_named(path)})",
        "state": "finished" if finished else f"at work: {owner}" if owner else "stopped; the same command goes on",
        "windows": f"{len(done)} done" if now is None else f"{len(done)} of {now['windows']} done",
        "losses": ", ".join(f"{each['block']}: {each['loss']:.3g}" for each in done[-8:]),
        "disk": f"{sum(file.st_size for file in files) / 1e6:.1f} MB",
        "last write": f"{_duration(max(0.0, time.time() - max(file.st_mtime for file in files)))} ago",
    }
    if now is not None and not finished:
        lines["now"] = (f"block {now['block']}, epoch {now['epoch'] + 1} of {now['epochs']}, step {now['step']}, "
                        f"loss {now['loss']:.3g}")  # fmt: skip
        lines["time left"] = _left(done, now)
    return "\n".join(f"{name:<11}{value}" for name, value in lines.items() if value)


def conclusion(run: RunDirectory) -> Iterator[str]:
    """Lines that say what a finished run has gained."""
    results = run.results
    yield render([Row(**row) for row in results["rows"]])
    blocks = [block for block in results["blocks"] if block["attempts"] and block["outcome"] != "trained"]
    if blocks:
        kept = ", ".join(f"{block['block']} ({block['outcome']})" for block in blocks)
        yield f"training did not help, so these blocks were left as named: {kept}"
    for cause in (Cause(**each) for block in results["blocks"] for each in block["causes"]):
        yield f"an attempt was stopped, {cause}"
    yield f"checkpoint: {run.checkpoint}"
    yield f"checked: {results['parity']}"


def _named(path: Path) -> str:
    """Model and scheme of the configuration."""
    try:
        model = yaml.safe_load((path / "config.yaml").read_text())["model"]
        return f"{model['pretrained']}, {model['scheme']}"
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return "its config.yaml cannot be read"


def _left(done: list[dict], now: dict) -> str:
    """From the mean time of the finished windows, less the share of epochs done in the one at work."""
    if not done:
        return "known after the first window"
    rest = now["windows"] - len(done) - min(1.0, (now["epoch"] + 1) / max(now["epochs"], 1))
    return _duration(max(0.0, rest) * sum(each["seconds"] for each in done) / len(done))


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
