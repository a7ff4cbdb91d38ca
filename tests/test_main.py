"""What the command line says when nothing, help or a traceback is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from aq_lightning.cli import main
from aq_lightning.errors import RequestError
from aq_lightning.verbs import VERBS


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_overview_names_every_verb(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    main(arguments)
    printed = capsys.readouterr().out
    verbs = {line.split()[0] for line in printed.splitlines() if line.startswith("  ")}
    assert verbs == {"fit", "plan", "test", "predict", "report", *VERBS}
    assert "--debug" in printed


def test_debug_lets_the_traceback_through(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RequestError, match="config.yaml"):
        main(["status", str(tmp_path), "--debug"])
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path)])
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_of_the_program_is_one_sentence(nursery: list[str], tmp_path: Path, debug: bool) -> None:
    """Of a process whose verb fails in a way that nobody foresaw."""
    program = (
        "import aq_lightning.cli as cli\n"
        "def broken(path: str) -> int:\n"
        "    raise ZeroDivisionError('a bug\\nmore of it')\n"
        "cli.VERBS['status'] = broken\n"
        "cli.main()\n"
    )
    (tmp_path / "broken.py").write_text(program)
    python = nursery if debug else [sys.executable]
    command = [*python, str(tmp_path / "broken.py"), "status", str(tmp_path), *(["--debug"] if debug else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == debug
    if not debug:
        assert done.stderr == (
            "error: ZeroDivisionError: a bug. This should not happen: add --debug to the command for the traceback, "
            "and report it.\n"
        )
