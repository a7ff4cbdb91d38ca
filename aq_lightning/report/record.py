"""What a run directory says, read for a report."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from torch import Tensor

from aq_lightning.calibration import RunDirectory
from aq_lightning.durable import read_json
from aq_lightning.errors import RequestError


@dataclass(frozen=True)
class Epoch:
    """One epoch of one window, as logged."""

    block: int
    """Index of the window's first block."""
    epoch: int
    """0, 1, …"""
    loss: float
    """Mean objective over the epoch's steps."""


@dataclass(frozen=True)
class Matrix:
    """A learnt matrix ``A ⊙ mask``."""

    block: int
    """Index in the model."""
    site: str
    """Where it acts."""
    effective: Tensor
    """float64 (blocks, size, size)."""
    mask: Tensor
    """float64 (size, size); 0 where the band never opened."""


@dataclass(frozen=True)
class Record:
    """A run, finished or not."""

    path: Path
    """Its directory."""

    def __post_init__(self) -> None:
        if not (self.path / "config.yaml").is_file():
            raise RequestError(
                f"A report needs a run's directory, got {str(self.path)!r}, which holds no config.yaml: name the --out "
                "of a `fit`."
            )

    @property
    def name(self) -> str:
        """The directory's."""
        return self.path.resolve().name

    @cached_property
    def model(self) -> Mapping[str, Any]:
        """The ``model:`` section of its configuration; empty if that cannot be read."""
        try:
            return dict(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))["model"])
        except (yaml.YAMLError, KeyError, TypeError, ValueError):
            return {}

    @property
    def title(self) -> str:
        """Model and scheme."""
        source = Path(str(self.model.get("pretrained", "a model"))).name
        return f"{source}, {self.model.get('scheme', 'scheme unknown')}"

    @cached_property
    def windows(self) -> list[dict[str, Any]]:
        """Metrics of the finished windows in order."""
        return RunDirectory(self.path).all_metrics()

    @cached_property
    def tuning(self) -> Mapping[str, Any]:
        """Metrics of the tuning of all blocks' scales; empty if there was none."""
        return RunDirectory(self.path).tuning() or {}

    @cached_property
    def results(self) -> Mapping[str, Any]:
        """The final table and what is said with it; empty if the run is not finished."""
        return read_json(self.path / "results.json") or {}

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The final table: full precision, round to nearest, this method last; empty if there is none."""
        return self.results.get("rows", ())

    @property
    def bits(self) -> float | None:
        """Effective bits per weight of the result; None if nothing is finished."""
        if self.rows:
            return self.rows[-1]["bits"]
        known = [window["effective_bits"] for window in self.windows]
        return sum(known) / len(known) if known else None

    @property
    def size(self) -> int | None:
        """Bytes of the result's tensors; None if it is not written."""
        return sum(file.stat().st_size for file in self.path.glob("checkpoint/*.safetensors")) or None

    @property
    def seconds(self) -> float:
        """Of the finished windows' calibration and the tuning, without scoring."""
        return sum(window["seconds"] for window in self.windows) + self.tuning.get("seconds", 0.0)

    @property
    def memory(self) -> int:
        """Peak bytes of the device, on a CPU of the whole process; 0 if nothing is finished."""
        return max((each["peak_memory_bytes"] for each in (*self.windows, self.tuning) if each), default=0)

    @cached_property
    def epochs(self) -> list[Epoch]:
        """Every epoch that was logged, in order; where one was trained again, the last time."""
        known: dict[tuple[int, int], Epoch] = {}
        for file in sorted(self.path.glob("logs/*/metrics.csv"), key=lambda path: path.stat().st_mtime):
            with file.open(encoding="utf-8", newline="") as table:
                for row in csv.DictReader(table):
                    if row.get("loss") and row.get("block") and row.get("epoch"):
                        place = int(float(row["block"])), int(float(row["epoch"]))
                        known[place] = Epoch(*place, float(row["loss"]))
        return [known[place] for place in sorted(known)]

    def matrices(self, most: int) -> list[Matrix]:
        """Learnt affine matrices of at most so many windows, evenly spread over depth."""
        files = sorted(self.path.glob("blocks/*[0-9]/transforms.safetensors"))
        chosen = {round(place * (len(files) - 1) / max(most - 1, 1)) for place in range(most)} if files else set()
        return [matrix for index in sorted(chosen) for matrix in _matrices(files[index])]


def _matrices(file: Path) -> list[Matrix]:
    """Of a window's first block."""
    first, found = int(file.parent.name), []
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
        for name in sorted(names):
            block, _, rest = name.partition(".transforms.")
            mask = f"{name.removesuffix('.matrix')}.mask"
            if block == "0" and name.endswith(".matrix") and mask in names:
                opened = tensors.get_tensor(mask)
                effective = tensors.get_tensor(name) * opened
                found.append(Matrix(first, rest.partition(".factors.")[0], effective, opened))
    return found
