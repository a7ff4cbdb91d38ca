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
        queue = self._queue(streams.full.device)
        self._writing = block, self._thread.submit(self._write, block, streams, queue)

    def _write(self, block: int, streams: Streams, queue: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(queue):  # copies to the host neither wait for the window at work nor hold it up
            self.journal.write_streams(block, streams)

    def _queue(self, device: torch.device) -> torch.cuda.Stream | None:
        """A GPU's own queue for copies, behind what is asked of it so far."""
        if device.type == "cpu":
            return None
        queue = torch.cuda.Stream(device)
        queue.wait_stream(torch.cuda.current_stream(device))
        return queue

    def finish(self) -> None:
        """Waits for the pair that is being written, and removes the one before.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            (block, written), self._writing = self._writing, None
            written.result()  # and with it the streams are let go
            self.journal.drop_streams(block)
