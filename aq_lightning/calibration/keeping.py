"""Streams on their way to the disk while the window that they enter is at work."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from aq_lightning.calibration.checkpoint import RunDirectory
from aq_lightning.calibration.streams import Streams


class Keeper:
    """Keeps streams in a run directory, one pair at a time in a thread; to be entered.

    A pair takes the place of the one before when it is whole on the disk: at the next call, or at the end. What went
    wrong is raised there too.

    Args:
        journal: of the run.
    """

    def __init__(self, journal: RunDirectory) -> None:
        self.journal = journal
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._writing: tuple[int, Future[None]] | None = None
        self._copies: dict[str, Tensor] = {}

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown()

    def keep(self, block: int, streams: Streams) -> None:
        """Begins to write the streams that enter the window that starts at ``block``; a GPU's are copied first."""
        self.finish()
        pair = {"full": streams.full, "quantized": streams.quantized}
        copies = Streams(**{name: x if x.device.type == "cpu" else self.copied(name, x) for name, x in pair.items()})
        self._writing = block, self._thread.submit(self.journal.write_streams, block, copies)

    def copied(self, name: str, stream: Tensor) -> Tensor:
        """A GPU's stream in memory of the host, the same for all pairs, so that its pages are new only once."""
        copy = self._copies.get(name)
        if copy is None or (copy.shape, copy.dtype) != (stream.shape, stream.dtype):
            copy = self._copies[name] = torch.empty(stream.shape, dtype=stream.dtype)
        return copy.copy_(stream)

    def finish(self) -> None:
        """Waits for the pair that is being written, and removes the one before.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            (block, written), self._writing = self._writing, None
            written.result()
            self.journal.drop_streams(block)
