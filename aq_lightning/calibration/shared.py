"""The run directory of several processes: one writes, and all read the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from aq_lightning import distributed
from aq_lightning.calibration.checkpoint import Resume, RunDirectory
from aq_lightning.durable import partial_of


class SharedRunDirectory(RunDirectory):
    """A run directory on a file system that all processes see.

    The leading process writes everything but streams, of which each keeps its own samples': ``streams/1/0007/``. What
    decides where a run goes on is asked of the leading one. All processes call the methods defined here, in one order.
    """

    def repair(self) -> list[str]:
        damaged = super().repair() if distributed.leads() else []
        self._manifests = distributed.from_first(self._manifests)
        return damaged

    def scratch(self, block: int) -> Path:
        return super().scratch(block) if distributed.leads() else partial_of(self._block(block))

    def put(self, block: int, weights: Mapping[str, Tensor]) -> None:
        if distributed.leads():
            super().put(block, weights)
        distributed.wait()

    def commit(self, block: int, metrics: Mapping[str, object]) -> None:
        if distributed.leads():
            super().commit(block, metrics)
        self._manifests = distributed.from_first(self._manifests)

    def finished(self, block: int) -> bool:
        answer = distributed.from_first(super().finished(block) if distributed.leads() else False)
        if not answer:
            self._manifests.pop(block, None)
        return answer

    def drop_streams(self, but: int) -> None:
        distributed.wait()  # until every process has the new ones
        super().drop_streams(but)

    def has_streams(self, start: int) -> bool:
        return not distributed.anyone(not super().has_streams(start))

    def remembered(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return distributed.from_first(super().remembered(name, compute) if distributed.leads() else {})

    def at_work(self, now: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        return super().at_work(now if distributed.leads() else None)

    def _streams(self, block: int) -> Path:
        return self.path / "streams" / str(distributed.rank()) / f"{block:04d}"


def open_run(path: Path, config: str, resume: Resume, ranks: int, rank: int) -> RunDirectory:
    """The directory of a run, which the leading process checks.

    Args:
        path, config, resume, ranks: see :meth:`RunDirectory.check`.
        rank: number of this process.

    Raises:
        RequestError: see :meth:`RunDirectory.check`.
    """
    kind = RunDirectory if ranks == 1 else SharedRunDirectory
    return kind.check(path, config, resume, ranks) if rank == 0 else kind(path)
