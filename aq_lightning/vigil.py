"""Processes that watch over one another, so that none waits for one that is gone.

Each holds a connection to the leading one. The operating system closes it with the process, however that ends, and
asks after silent hosts. What waits in a collective operation cannot be woken: a thread ends the process instead, with a
sentence and the exit code after which the same command goes on.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from types import TracebackType

from aq_lightning import distributed
from aq_lightning.errors import Interrupted, RequestError

_GRACE = 10.0  # seconds in which a process comes to its own end after another said farewell with a fault
_DOUBT = 3.0  # seconds in which it shows whether a failure is that of another process
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a lost host is noticed after 25 s
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Vigil:
    """A context in which this process watches the others; alone, it does nothing.

    Whoever leaves says with what, and while they are connected waits until all have left or one is gone: an orderly end
    alarms nobody.
    """

    def __init__(self) -> None:
        self._peers: dict[int, socket.socket] = {}
        self._farewells = threading.Semaphore(0)
        self._leaving = threading.Event()

    def __enter__(self) -> Vigil:
        if distributed.ranks() > 1:
            self._meet()
            _relieve()
            for rank, peer in self._peers.items():
                threading.Thread(target=self._watch, args=(rank, peer), daemon=True, name=f"vigil-{rank}").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = _code(kind)
        if code == 1 and self._peers:  # perhaps of an operation whose other end is gone: then its watcher ends this too
            time.sleep(_DOUBT)
        self._leaving.set()
        self._tell(code, "" if error is None else str(error) or kind.__name__)
        patience = _GRACE if code else 0 if distributed.ranks() == 1 else None
        for _ in self._peers:
            self._farewells.acquire(timeout=patience)

    def _meet(self) -> None:
        """Connects everyone to the leading process."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        listener = None
        if distributed.leads():
            listener = socket.create_server((host if host in _LOOPBACK else "", 0), backlog=distributed.ranks())
        port = distributed.from_first(listener.getsockname()[1] if listener is not None else 0)
        if listener is None:
            self._peers[0] = socket.create_connection((host, port))
            self._peers[0].sendall(distributed.rank().to_bytes(4, "little"))
        else:
            for _ in range(distributed.ranks() - 1):
                peer, _ = listener.accept()
                self._peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")] = peer
            listener.close()
        for peer in self._peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                if option in vars(socket):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        distributed.wait()

    def _tell(self, code: int, why: str) -> None:
        line = json.dumps({"code": code, "why": why}).encode() + b"\n"
        for peer in self._peers.values():
            try:
                peer.sendall(line)
            except OSError:
                continue  # it is gone, which its watcher sees

    def _watch(self, rank: int, peer: socket.socket) -> None:
        """Waits for a process's farewell; ends this one if the other is gone, or left with a fault."""
        try:
            line = peer.makefile("rb").readline()
        except OSError:
            line = b""
        if line:
            farewell = json.loads(line)
            self._farewells.release()
            if farewell["code"] == 0 or self._leaving.wait(_GRACE):
                return
            self._end(farewell["code"], farewell["why"], speak=distributed.leads())
        elif not self._leaving.is_set():
            lost = f"process {rank} of {distributed.ranks()} is gone; what is finished is safe"
            self._end(
                os.EX_TEMPFAIL,
                f"{lost}: the same command goes on.",
                speak=distributed.leads() or distributed.rank() == 1,
            )
        else:
            self._farewells.release()

    def _end(self, code: int, why: str, speak: bool) -> None:
        """Ends this process at once, wherever it waits."""
        if speak:
            sys.stderr.write(f"{'error: ' if code != os.EX_TEMPFAIL else ''}{why}\n")
            sys.stderr.flush()
        self._tell(code, why)
        time.sleep(0.2)  # so that the others read it before the connection breaks
        os._exit(code)


def _relieve() -> None:
    """Ends the watch of Lightning's launcher, which kills the first process once it finds another gone, whatever that
    was about to say and to exit with: from here on the vigil knows it first."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            vars(thread)["_child_processes"] = ()


def _code(kind: type[BaseException] | None) -> int:
    """Exit code of a process that ends with such an exception."""
    if kind is None:
        return 0
    if issubclass(kind, Interrupted):
        return os.EX_TEMPFAIL
    return 2 if issubclass(kind, RequestError) else 1
