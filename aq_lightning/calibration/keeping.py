"""Streams on their way to the disk while the window that they enter is at work."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

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
        self._queue: torch.cuda.Stream | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown()

    def keep(self, block: int, streams: Streams) -> None:
        """Begins to write the streams that enter the window that starts at ``block``; they must stay as they are."""
        self.finish()
        device = streams.full.device
        if device.type == "cuda":
            # Of high priority, for those of normal priority come from a pool that steps are recorded on in turn.
            self._queue = self._queue or torch.cuda.Stream(device, priority=-1)
            self._queue.wait_stream(torch.cuda.current_stream(device))
        self._writing = block, self._thread.submit(self._write, block, streams)

    def _write(self, block: int, streams: Streams) -> None:
        if self._queue is not None:
            torch.cuda.set_device(self._queue.device)  # a thread begins on the first GPU, which may be another's
        with torch.cuda.stream(self._queue):  # copies to the host neither wait for the window at work nor hold it up
            self.journal.write_streams(block, streams)

    def finish(self) -> None:
        """Waits for the pair that is being written, and removes the one before.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            (block, written), self._writing = self._writing, None
            written.result()
            self.journal.drop_streams(block)
