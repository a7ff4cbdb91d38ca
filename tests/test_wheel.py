"""The wheel holds everything: installed alone, it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest
from helpers import ROOT

PARTS = ("aq_lightning", "callbacks", "configs", "train.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command: object, cwd: Path) -> str:
    """Output of a command that must succeed, in a process that knows nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd, capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without network."""
    place = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            copytree(ROOT / part, place / "source" / part, ignore=ignore_patterns("__pycache__"))
        else:
            (place / "source" / part).write_bytes((ROOT / part).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", place, place / "source", cwd=place)
    (built,) = place.glob("*.whl")
    return built


def test_wheel_holds_code_and_data(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for part, pattern in (("aq_lightning", "*.py"), ("callbacks", "*.py"), ("configs", "*.yaml"))
        for path in (ROOT / part).rglob(pattern)
    }
    assert expected | {"aq_lightning/py.typed", "aq_lightning/report/style.css", "train.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]


def test_wheel_alone_runs(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which sees this one's dependencies but not this package."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    found = run(python, "-c", "import aq_lightning, configs; print(aq_lightning.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(tmp_path)
    aq = tmp_path / "env/bin/aq"
    assert run(aq, "--help", cwd=tmp_path).startswith("usage: aq VERB")
    printed = run(aq, "fit", "--config", "affinequant", "--print_config", cwd=tmp_path)
    assert "class_path: aq_lightning.transforms.Affine" in printed
