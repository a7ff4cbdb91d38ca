"""What is said when a run has ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aq_lightning.calibration import Cause
from aq_lightning.evaluation import Row, render
from aq_lightning.report import REPORT


def program() -> str:
    """How this program was called, for commands to copy."""
    return "aq" if Path(sys.argv[0]).name == "aq" else "python train.py"


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
    yield f"checkpoint: {path / 'checkpoint'}"
    yield f"checked: {results['parity']}"
    if (path / REPORT).is_file():
        yield f"report: {path / REPORT}"
    yield "next:"
    yield f"  {program} test --model.pretrained {path / 'checkpoint'} --data.source wikitext2"
    if not rows[-1].overhead:  # no other format holds online products
        yield f"  {program} export --run {path} --format gguf"
    if not (path / REPORT).is_file():
        yield f"  {program} report {path}"
