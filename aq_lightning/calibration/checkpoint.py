"""The run directory: what a calibration leaves behind, block by block, each step whole or absent, and never trusted
once damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from aq_lightning.calibration.lock import Lock
from aq_lightning.calibration.streams import Streams
from aq_lightning.durable import (
    fresh,
    intact,
    listing,
    manifest,
    partial_of,
    read_json,
    remove,
    save_tensors,
    seal,
    sealed,
    sync,
    write_json,
    write_text,
)
from aq_lightning.errors import RequestError
from aq_lightning.wording import changed_lines

Resume = Literal["auto", "must", "never"]

_CONFIG = "config.yaml"
_FINGERPRINT = "fingerprint.json"
_LOCK = "lock"
_RESULTS = "results.json"
_CHECKPOINT = "checkpoint.json"
_WEIGHTS = "weights.safetensors"
_METRICS = "metrics.json"
_AT_WORK = "now.json"
_STREAMS = "streams.safetensors"
WORLD = "world size"  # in the fingerprint: the number of processes
WHOLE = 9999  # the window behind all others, ``tuning/``
_TUNING = "tuning"


class RunDirectory:
    """Layout of a run.

    ``config.yaml``: the resolved configuration. ``fingerprint.json``: model, data and versions. ``rotation/``,
    ``written/``: made before all windows. ``blocks/0007/``: a finished window, named after its first block:
    ``weights.safetensors``, ``transforms.safetensors``, ``metrics.json``. ``streams/0007/``: what enters the window at
    work. ``inside/``: the checkpoints inside it. ``tuning/``: what followed for all blocks together, a window with what
    it changed alone. ``logs/``: the loggers'. ``checkpoint/``: the result, ``checkpoint.json`` its sums.
    ``results.json``: the table. ``lock``: the process at work. A finished window names the sum of the one before it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.foundation: str | None = None  # sum of what all windows stand on; None: nothing but the model
        self._manifests: dict[int, dict[str, Any]] = {}

    @classmethod
    def check(cls, path: Path, config: str, resume: Resume = "auto", ranks: int = 1) -> RunDirectory:
        """Checks without writing that a run can live at ``path``.

        Args:
            path: directory to create, or one that holds a run of the same configuration, which then goes on.
            config: resolved configuration as YAML.
            resume: whether a run that is there goes on (``auto``), is demanded (``must``) or refused (``never``).
            ranks: processes of the run.

        Raises:
            RequestError: something else is there, or the place cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise RequestError(f"A run needs a directory, got {str(path)!r}, which is a file: choose another --out.")
        parent = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RequestError(f"A run directory must be writable, got {str(path)!r}: choose another --out.")
        run = cls(path)
        begun = (path / _CONFIG).is_file()
        if resume == "must" and not begun:
            raise RequestError(f"--resume must goes on with a run, got {str(path)!r}, which holds none: correct --out, "
                               "or leave --resume out.")  # fmt: skip
        if resume == "never" and begun:
            raise RequestError(f"--resume never begins in a new place, got {str(path)!r}, which holds a run: choose "
                               "another --out, or leave --resume out.")  # fmt: skip
        if not begun and path.exists() and not all(_may_precede(entry) for entry in path.iterdir()):
            raise RequestError(f"A run directory is new, empty or an earlier run, got {str(path)!r}, which holds other "
                               "files: choose another --out.")  # fmt: skip
        run.lock_file.check()
        before = (read_json(path / _FINGERPRINT) or {}).get(WORLD, str(ranks)) if begun else str(ranks)
        if before != str(ranks):
            raise RequestError(f"A run goes on with as many processes as it began with, got {ranks} for {str(path)!r}, "
                               f"which began with {before}: set --trainer.devices times --trainer.num_nodes to "
                               f"{before}, or choose another --out.")  # fmt: skip
        changes = changed_lines((path / _CONFIG).read_text(errors="replace"), config) if begun else []
        if changes:
            raise RequestError(
                f"A run directory belongs to one configuration, got {str(path)!r}, which holds another "
                f"({'; '.join(changes[:4])}{'; …' if len(changes) > 4 else ''}): choose another --out, or delete it."
            )
        return run

    def check_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Checks that a run which goes on finds the model, data and versions that it began with.

        Raises:
            RequestError: one of them differs.
        """
        if not (self.path / _CONFIG).is_file():
            return
        began = read_json(self.path / _FINGERPRINT)
        if began is None:
            raise RequestError(f"A run that goes on has its fingerprint, got {str(self.path / _FINGERPRINT)!r} missing "
                               "or damaged: choose another --out.")  # fmt: skip
        names = sorted({*began, *fingerprint})
        different = [f"{name}: {began.get(name, 'none')} → {fingerprint.get(name, 'none')}"
                     for name in names if began.get(name) != fingerprint.get(name)]  # fmt: skip
        if different:
            raise RequestError(f"A run goes on with the model, data and versions that it began with, got "
                               f"{str(self.path)!r}, where these differ ({'; '.join(different)}): restore them, or "
                               "choose another --out.")  # fmt: skip

    @property
    def lock_file(self) -> Lock:
        """Which process is at work here."""
        return Lock(self.path / _LOCK)

    def lock(self) -> Lock:
        """Makes the directory; its lock, to hold while anything else is written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"A run directory must be writable, got {str(self.path)!r} ({error.strerror}): choose "
                               "another --out.") from error  # fmt: skip
        return self.lock_file

    def create(self, config: str, fingerprint: Mapping[str, str]) -> None:
        """Writes what a run is recognized by; the configuration comes last."""
        if not (self.path / _CONFIG).exists():
            write_json(self.path / _FINGERPRINT, fingerprint)
            write_text(self.path / _CONFIG, config)
            sync(self.path.parent)

    def repair(self) -> list[str]:
        """Removes what killed processes left unfinished, and finished windows and checkpoints that are damaged.

        Returns:
            Names of what was damaged.
        """
        for scratch in [*self.path.glob("*.partial"), *self.path.glob("*/*.partial")]:
            remove(scratch)
        damaged = []
        self._manifests = {}
        for place in [*sorted(self.path.glob("blocks/[0-9]*[0-9]")), *self.path.glob(_TUNING)]:
            content, tuning = manifest(place), place.name == _TUNING
            if content is not None and "after" in content and content["files"].keys() >= {_WEIGHTS, _METRICS}:
                self._manifests[WHOLE if tuning else int(place.name)] = content
            else:
                damaged.append(_TUNING if tuning else f"block {place.name}")
                remove(place)
        if self.checkpoint.exists() and not self.exported():
            damaged.append("checkpoint")
            remove(self.checkpoint)
        return damaged

    @property
    def checkpoint(self) -> Path:
        """Where the result goes."""
        return self.path / "checkpoint"

    def exported(self) -> bool:
        """Whether the result is there, every byte as it was written."""
        sums = read_json(self.path / _CHECKPOINT)
        return sums is not None and intact(self.checkpoint, sums["files"])

    def seal_checkpoint(self) -> None:
        """Notes the sums of the result's files."""
        write_json(self.path / _CHECKPOINT, {"files": listing(self.checkpoint)})

    def scratch(self, block: int) -> Path:
        """A fresh directory in which the window that starts at ``block`` is prepared."""
        return fresh(self._block(block))

    def put(self, block: int, weights: Mapping[str, Tensor]) -> None:
        """Writes a window's packed weights to its scratch directory."""
        save_tensors(partial_of(self._block(block)) / _WEIGHTS, weights)

    def commit(self, block: int, metrics: Mapping[str, object]) -> None:
        """Completes a window: everything in its scratch directory, its weights too, and its metrics appear at once."""
        write_text(partial_of(self._block(block)) / _METRICS, json.dumps(metrics, indent=2))
        self._manifests[block] = seal(self._block(block), {"after": self._sum_before(block)})
        remove(self.inside)

    def finished(self, block: int) -> bool:
        """Whether the window that starts at ``block`` is complete; all before it must be.

        One that was fitted behind other windows than those before it now is removed.
        """
        content = self._manifests.get(block)
        if content is None:
            return False
        if content["after"] != self._sum_before(block):
            del self._manifests[block]
            remove(self._block(block))
        return block in self._manifests

    def weights(self, block: int, device: str = "cpu") -> dict[str, Tensor]:
        """Packed weights of a window that is finished, or whose weights were put, on a device."""
        place = self._block(block)
        return load_file((place if block in self._manifests else partial_of(place)) / _WEIGHTS, device)

    def write_streams(self, block: int, streams: Streams) -> None:
        """Writes the streams that enter the window that starts at ``block``, which are whole or absent."""
        target = self._streams(block)
        remove(target)
        with sealed(target, {"after": self._sum_before(block)}) as partial:
            save_tensors(partial / _STREAMS, streams.tensors())

    def drop_streams(self, but: int) -> None:
        """Removes all kept streams but those that enter the window that starts at ``but``."""
        target = self._streams(but)
        for other in target.parent.iterdir():
            if other != target:
                remove(other)

    def kept(self, starts: Sequence[int]) -> tuple[int, Streams] | None:
        """The latest window, of those that start at ``starts``, whose entering streams are kept, and these, on the
        host: all windows before it are finished."""
        reached = next((index for index, start in enumerate(starts) if not self.finished(start)), len(starts) - 1)
        for start in reversed(starts[: reached + 1]):
            if self.has_streams(start):
                return start, Streams(**load_file(self._streams(start) / _STREAMS))
        return None

    def has_streams(self, start: int) -> bool:
        """Whether the streams that enter the window that starts there are kept, undamaged."""
        content = manifest(self._streams(start))
        return content is not None and content["after"] == self._sum_before(start)

    @property
    def inside(self) -> Path:
        """Where the checkpoints inside the window at work are."""
        return self.path / "inside"

    def remembered(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """``compute()``, or what it answered before in this run."""
        path = self.path / f"{name}.json"
        content = read_json(path)
        if content is None:
            content = compute()
            write_json(path, content)
        return content

    def at_work(self, now: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Notes where the run stands, or says what was noted last."""
        if now is not None:
            write_json(self.path / _AT_WORK, now, lasting=False)
        return read_json(self.path / _AT_WORK)

    def all_metrics(self) -> list[dict[str, Any]]:
        """Metrics of the finished windows in order."""
        return [json.loads(path.read_text()) for path in sorted(self.path.glob(f"blocks/*[0-9]/{_METRICS}"))]

    def tuning(self) -> dict[str, Any] | None:
        """Metrics of what followed for the whole model; None: nothing."""
        return next((json.loads(path.read_text()) for path in self.path.glob(f"{_TUNING}/{_METRICS}")), None)

    @property
    def results(self) -> dict[str, Any] | None:
        """The final table of a finished run whose result is undamaged."""
        return read_json(self.path / _RESULTS) if self.exported() else None

    def finish(self, results: Mapping[str, object]) -> None:
        """Writes the final table, and removes what was kept for going on."""
        write_json(self.path / _RESULTS, results)
        for scratch in (self.path / "streams", self.inside, self.path / _AT_WORK):
            remove(scratch)

    def _block(self, block: int) -> Path:
        return self.path / (_TUNING if block == WHOLE else f"blocks/{block:04d}")

    def _streams(self, block: int) -> Path:
        return self.path / "streams" / f"{block:04d}"

    def _sum_before(self, block: int) -> str | None:
        """Sum of the weights of the window before ``block``; before the first that of the foundation."""
        before = [index for index in tuple(self._manifests) if index < block]  # to which another thread may add
        return self._manifests[max(before)]["files"][_WEIGHTS]["sha256"] if before else self.foundation


def _may_precede(entry: Path) -> bool:
    """Whether an entry of a directory may have been left by a process that was killed before its run began."""
    return entry.suffix == ".partial" or entry.name in (_LOCK, _FINGERPRINT)
