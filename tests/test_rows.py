"""Benchmarks' rows: each in a process of its own, within its limits, and never computed twice."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT

from benchmarks.accuracy import configuration, spread, table
from benchmarks.rows import Limits, Row, result, work

SCRIPT = """
import json, os, sys, time
task = json.load(open(sys.argv[1]))
open(task["mark"], "a").write("x")
print("says", task["name"], os.environ["PYTHONPATH"].split(os.pathsep)[0], flush=True)
time.sleep(task.get("sleep", 0))
if task.get("fail"):
    sys.exit("it broke")
json.dump({"value": task["value"]}, open(sys.argv[2], "w"))
"""


@pytest.fixture
def row(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(name: str, path: tuple[Path, ...] = (), **task: object) -> Row:
        return Row(name, {"name": name, "mark": str(tmp_path / f"{name}.mark"), "value": 1, **task}, script, path)

    return make


def runs(tmp_path: Path, name: str) -> int:
    return len((tmp_path / f"{name}.mark").read_text())


def test_finished_rows_are_kept_and_failed_ones_named(row, tmp_path: Path) -> None:
    rows, out = [row("good", (tmp_path / "own",)), row("bad", fail=True)], tmp_path / "out"
    ended = dict((each.name, found) for each, found in work(rows, out, Limits(processes=2)))
    assert ended["good"] == {"value": 1} == result(rows[0], out)
    assert ended["bad"] == f"failed: see {out / 'bad.log'}" and "it broke" in (out / "bad.log").read_text()
    assert f"says good {tmp_path / 'own'}" in (out / "good.log").read_text(), "its own packages come first"
    assert [each.name for each, _ in work(rows, out, Limits())] == ["bad"]
    assert (runs(tmp_path, "good"), runs(tmp_path, "bad")) == (1, 2)


def test_a_row_is_given_up_after_its_minutes_with_all_attempts_counted(row, tmp_path: Path) -> None:
    slow, out = row("slow", sleep=60), tmp_path / "out"
    began = time.monotonic()
    ((_, why),) = work([slow], out, Limits(minutes=1.5 / 60))
    assert why == "given up after 0.025 minutes" and time.monotonic() - began < 30
    assert float((out / "slow.spent").read_text()) >= 1.5
    ((_, why),) = work([slow], out, Limits(minutes=1.5 / 60))
    assert why.startswith("was given up after 0.02") and runs(tmp_path, "slow") == 1, "it is not tried again"
    ((_, why),) = work([slow], out, Limits(minutes=3 / 60))
    assert why.startswith("given up after 0.05") and runs(tmp_path, "slow") == 2, "unless it is given more"
    assert float((out / "slow.spent").read_text()) >= 3 and time.monotonic() - began < 60


def test_when_time_is_up_nothing_goes_on_running(row, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert list(work([row("slow", sleep=60), row("next")], out, Limits(seconds=2))) == []
    assert runs(tmp_path, "slow") == 1 and not (tmp_path / "next.mark").exists()
    assert (out / "slow.spent").exists() and not any(
        str(out / "slow.task") in path.read_bytes().decode(errors="ignore")
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.parent.name != str(os.getpid()) and path.exists()
    )


def test_the_table_has_a_line_for_all_seeds_of_a_cell() -> None:
    cell = {"method": "gptq", "scheme": "w3a16", "calibration": "c4", "bits": 3.25, "minutes": 2.0}
    found = [
        {**cell, "seed": 1, "perplexity": {"wikitext2": 10.0, "c4": 20.0}},
        {**cell, "seed": 2, "perplexity": {"wikitext2": 12.0, "c4": 20.0}},
        {
            **cell,
            "scheme": "w4a16",
            "seed": 1,
            "version": "9",
            "overhead": 22.2,
            "perplexity": {"wikitext2": 12345.6, "c4": 7.0},
        },
    ]
    lines = table(found, ["wikitext2", "c4"]).splitlines()
    assert lines[2] == "| w3a16 | gptq | c4 | 11.00 ± 1.41 | 20.00 ± 0.00 | 3.25 | 2.0 | 2 |"
    assert (
        lines[3] == "| w4a16 | gptq 9, +22 % multiply–adds | c4 | 1.23e+04 | 7.00 | 3.25 | 2.0 | 1 |"
        and len(lines) == 4
    )
    assert spread([1.0]) == "1.00"


def test_methods_are_files_of_configs_or_named(tmp_path: Path) -> None:
    assert configuration("gptq").is_file()
    assert configuration(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"


def test_the_accuracy_benchmark_from_end_to_end(
    nursery: list[str], model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    """Full precision and round-to-nearest, scored as transformers loads them; what cannot be run is named."""
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(text_file.read_text().split())))
    command = [
        *nursery, str(ROOT / "benchmarks" / "accuracy.py"), str(model_directory), f"--out={tmp_path / 'out'}",
        "--device=cpu", "--processes=2", "--calibration", f"book={text_file}", "--evaluation", f"other={other}",
        "--methods", "rtn", "absent.yaml", "--schemes", "w3a16g32", "--samples=4", "--length=32",
        "--evaluation-length=32",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert "absent is left out, no configuration" in done.stdout and "all rows are there" in done.stdout
    full, nearest = json.loads((tmp_path / "out/accuracy.json").read_text())["rows"]
    assert (full["method"], nearest["method"]) == ("full precision", "rtn")
    assert full["bits"] == 16 > nearest["bits"] == 3 + 19 / 32 and full["perplexity"] != nearest["perplexity"]
    assert nearest["reader"] == "transformers" and nearest["minutes"] > 0 and nearest["error"]["other"] > 0
    assert "| w3a16g32 | rtn | – |" in (tmp_path / "out/accuracy.md").read_text()
