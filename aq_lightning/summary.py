"""What a run says while it works, and when it has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from aq_lightning.calibration import Cause, Position
from aq_lightning.conversion import Run
from aq_lightning.errors import RequestError
from aq_lightning.evaluation import Row, render
from aq_lightning.export import formats
from aq_lightning.report import REPORT, write_report
from aq_lightning.wording import divergences, duration

_FORMATS: tuple[formats.Name, ...] = ("awq", "gptq", "gptq_v2", "dense")  # what engines take most widely comes first


def program() -> str:
    """How this program was called, for commands to copy."""
    return "aq" if Path(sys.argv[0]).name == "aq" else "python train.py"


@rank_zero_only
def say(line: str) -> None:
    """A line for a reader or a log, above whatever bar is shown."""
    tqdm.write(line)
    sys.stdout.flush()


class Log:
    """A line for each window when it is done.

    Args:
        tuned: whether the whole model's scales are tuned behind the last.
    """

    def __init__(self, tuned: bool) -> None:
        self.began, self.done, self.tuned = time.monotonic(), 0, tuned

    def window(self, position: Position, metrics: Mapping[str, Any]) -> None:
        """Says what became of a window, and how long the others will take; or of the whole model."""
        self.done += 1
        rest = position.windows - position.window - 1
        if rest < 0:
            say(f"scales of all blocks: {tuned_line(metrics)}, {duration(metrics['seconds'])}, "
                f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB")  # fmt: skip
            say("writing and checking the checkpoint")
            return
        left = duration(rest * (time.monotonic() - self.began) / self.done)
        outcome = "" if metrics["outcome"] == "trained" or not metrics["attempts"] else f", {metrics['outcome']}"
        say(
            f"block {metrics['block']} ({position.window + 1} of {position.windows}): loss {metrics['loss']:.3g} "
            f"(round to nearest {metrics['rtn_loss']:.3g}{outcome}), {duration(metrics['seconds'])}, "
            f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB, " + (f"{left} left" if rest else "the last")
        )
        if not rest:
            say("tuning the scales of all blocks" if self.tuned else "writing and checking the checkpoint")


def tuned_line(metrics: Mapping[str, Any]) -> str:
    """What became of the scales, in words."""
    kept = "" if metrics["outcome"] == "trained" else ": training did not help, so they were left as they were"
    return f"divergence from full precision {divergences(metrics)}{kept}"


@rank_zero_only
def draw(path: Path) -> None:
    """``RUN/report.html``, if it is not there yet; a run is finished without it."""
    try:
        if not (path / REPORT).exists():
            write_report(path)
    except RequestError as error:
        say(f"note: no report. {error}")


def summary_lines(path: Path, results: Mapping[str, Any], program: str) -> Iterator[str]:
    """The table, what went otherwise, where things are, and commands to go on with.

    Args:
        path: the run's directory.
        results: its ``results.json``.
        program: how it is called.
    """
    rows = [Row(**row) for row in results["rows"]]
    yield render(rows)
    blocks = [block for block in results["blocks"] if block["attempts"] and block["outcome"] != "trained"]
    if blocks:
        kept = ", ".join(f"{block['block']} ({block['outcome']})" for block in blocks)
        yield f"training did not help, so these blocks were left as named: {kept}"
    for cause in (Cause(**each) for block in results["blocks"] for each in block["causes"]):
        yield f"an attempt was stopped, {cause}"
    if results.get("tuning") and results["tuning"]["outcome"] != "trained":
        yield f"scales of all blocks: {tuned_line(results['tuning'])}"
    yield f"checkpoint: {path / 'checkpoint'}"
    yield f"checked: {results['parity']}"
    if (path / REPORT).is_file():
        yield f"report: {path / REPORT}"
    yield "next:"
    yield f"  {program} test --model.pretrained {path / 'checkpoint'} --data.source wikitext2"
    form = _format(path)
    if form:
        yield f"  {program} export --run {path} --format {form}"
    if not (path / REPORT).is_file():
        yield f"  {program} report {path}"


def _format(path: Path) -> str:
    """A format that holds a run's result; empty if none does but the one that it has."""
    for name in _FORMATS:
        try:
            formats.named(name).check(Run(path).subject()[0])
        except RequestError:
            continue
        return name
    return ""
