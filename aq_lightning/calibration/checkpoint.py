"""The run directory: what a calibration leaves behind, block by block, each step whole or absent."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from aq_lightning.errors import RequestError

_CONFIG = "config.yaml"
_RESULTS = "results.json"
_WEIGHTS = "weights.safetensors"
_METRICS = "metrics.json"


class RunDirectory:
    """Layout of a run.

    ``config.yaml``: the resolved configuration. ``blocks/0007/``: a finished window, named after its first block:
    ``weights.safetensors`` (packed), ``transforms.safetensors`` (float64), ``metrics.json``. ``logs/``: the loggers'.
    ``checkpoint/``: the result. ``results.json``: the final table. A window's directory is filled under a temporary
    name and renamed, so it is either whole or not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def check(cls, path: Path, config: str) -> RunDirectory:
        """Checks without writing that a run can live at ``path``.

        Args:
            path: directory to create, or one that holds a run of the same configuration, which then goes on.
            config: resolved configuration as YAML.

        Raises:
            RequestError: something else is there, or the place cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise RequestError(f"A run needs a directory, got {str(path)!r}, which is a file: choose another --out.")
        parent = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RequestError(f"A run directory must be writable, got {str(path)!r}: choose another --out.")
        run = cls(path)
        if not path.exists() or all(entry.suffix == ".partial" for entry in path.iterdir()):
            return run
        if not (path / _CONFIG).is_file():
            raise RequestError(f"A run directory is new, empty or an earlier run, got {str(path)!r}, which holds other "
                               "files: choose another --out.")  # fmt: skip
        changes = _changes((path / _CONFIG).read_text(), config)
        if changes:
            raise RequestError(
                f"A run directory belongs to one configuration, got {str(path)!r}, which holds another "
                f"({'; '.join(changes[:4])}{'; …' if len(changes) > 4 else ''}): choose another --out, or delete it."
            )
        return run

    def create(self, config: str) -> None:
        """Makes the directory and writes the configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / _CONFIG).exists():
            _write(self.path / _CONFIG, config)

    @property
    def checkpoint(self) -> Path:
        """Where the result goes."""
        return self.path / "checkpoint"

    def scratch(self, block: int) -> Path:
        """A fresh directory in which the window that starts at ``block`` is prepared."""
        scratch = self._block(block).with_suffix(".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        return scratch

    def commit(self, block: int, weights: Mapping[str, Tensor], metrics: Mapping[str, object]) -> None:
        """Completes a window: everything in its scratch directory, its weights and metrics appear at once."""
        scratch = self._block(block).with_suffix(".partial")
        save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, scratch / _WEIGHTS)
        _write(scratch / _METRICS, json.dumps(metrics, indent=2))
        for file in scratch.iterdir():
            _sync(file)
        _sync(scratch)
        os.replace(scratch, self._block(block))
        _sync(self._block(block).parent)

    def finished(self, block: int) -> bool:
        """Whether the window that starts at ``block`` is complete."""
        return (self._block(block) / _METRICS).is_file()

    def weights(self, block: int) -> dict[str, Tensor]:
        """Packed weights of a finished window."""
        return load_file(self._block(block) / _WEIGHTS)

    def all_metrics(self) -> list[dict[str, object]]:
        """Metrics of the finished windows in order."""
        return [json.loads(path.read_text()) for path in sorted(self.path.glob(f"blocks/*[0-9]/{_METRICS}"))]

    @property
    def results(self) -> dict[str, object] | None:
        """The final table of a finished run."""
        path = self.path / _RESULTS
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self, results: Mapping[str, object]) -> None:
        """Writes the final table."""
        _write(self.path / _RESULTS, json.dumps(results, indent=2))

    def _block(self, block: int) -> Path:
        return self.path / "blocks" / f"{block:04d}"


def _changes(before: str, after: str) -> list[str]:
    """Changed lines of two configurations, as ``- old`` and ``+ new``."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [f"{line[0]} {line[1:].strip()}" for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


def _write(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    """Forces a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
