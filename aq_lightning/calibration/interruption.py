"""Being told to stop: at once where nothing is lost, else at the end of the step, after a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from aq_lightning.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Turns the first SIGTERM or SIGINT into :class:`Interrupted`: raised at once, or where :meth:`deferred` is open,
    by whoever looks at :attr:`requested`. A second signal is not waited for. :attr:`heard` says whether signals come.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.heard = False
        self._deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        again, self.requested = self.requested is not None, signal.Signals(number).name
        if again or not self._deferred:
            self.stop()

    def stop(self, where: str = "") -> None:
        """
        Args:
            where: what was saved.

        Raises:
            Interrupted: always.
        """
        by = self.requested or "a signal to another process"
        raise Interrupted(f"stopped by {by}{where}: the same command goes on from there.")

    def take_back(self) -> None:
        """Takes the signals back from whoever has asked for them since."""
        for each in SIGNALS if self.heard else ():
            signal.signal(each, self)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it is open, the signals come here; threads other than the main one cannot ask for them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self) for each in SIGNALS}
        self.heard = True
        try:
            yield
        finally:
            self.heard = False
            for each, handler in before.items():
                signal.signal(each, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While it is open, a signal is only noted; it is raised at the end if nobody else did."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.requested is not None:
            self.stop()
