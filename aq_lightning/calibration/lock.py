"""One process to a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from aq_lightning.errors import RequestError

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # by some cluster file systems


class Lock:
    """A file that names the process a directory belongs to, locked by the operating system while that process lives.

    A killed process leaves the file, but not the lock: the next one takes it over. Where the file system cannot lock,
    the file alone decides: a process that is gone from this host has no say, one on another host has.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __enter__(self) -> Lock:
        """
        Raises:
            RequestError: another process has it.
        """
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            if not self._taken(self._descriptor):
                os.close(self._descriptor)
                self._refuse(self._named())
            if self.path.exists() and os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                break  # otherwise its owner removed it between the opening and the locking
            os.close(self._descriptor)
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())})
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def check(self) -> None:
        """
        Raises:
            RequestError: another process has it.
        """
        owner = self.owner()
        if owner is not None:
            self._refuse(owner)

    def owner(self) -> str | None:
        """The process that has the lock, as a phrase; None if it is free."""
        if not self.path.exists():
            return None
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return None if self._taken(descriptor) else self._named()
        finally:
            os.close(descriptor)

    def _taken(self, descriptor: int) -> bool:
        """Locks the file if nobody else has."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return not self._alive()
        return True

    def _refuse(self, owner: str) -> None:
        raise RequestError(
            f"A run directory serves one process, got {str(self.path.parent)!r}, which belongs to {owner}: "
            "wait for it, stop it, or choose another --out."
        )

    def _record(self) -> dict[str, object]:
        try:
            return dict(json.loads(self.path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):  # not yet written
            return {}

    def _named(self) -> str:
        record = self._record()
        return f"process {record.get('pid', '?')} on {record.get('host', '?')}"

    def _alive(self) -> bool:
        record = self._record()
        here = record.get("host") == socket.gethostname()
        return bool(record) and not (here and _started(record.get("pid")) != record.get("started"))


def _started(pid: object) -> int | None:
    """When a process of this host started, in clock ticks since boot, so that a number used again is told apart; None
    if there is none."""
    try:
        fields = Path(f"/proc/{int(str(pid))}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return int(fields[19])
