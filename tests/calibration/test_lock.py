"""One process to a directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aq_lightning.calibration.lock import Lock
from aq_lightning.errors import RequestError

HOLD = "import sys; from pathlib import Path; from aq_lightning.calibration.lock import Lock\n"
HOLD += "with Lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path: Path, holder: subprocess.Popen) -> None:
    lock = Lock(tmp_path / "lock")
    named = f"process {holder.pid} on {socket.gethostname()}"
    assert lock.owner() == named
    for refuse in (lock.check, lock.__enter__):
        with pytest.raises(RequestError, match=f"serves one process.*{named}: wait for it"):
            refuse()
    holder.kill()
    holder.wait()
    assert lock.path.exists() and lock.owner() is None, "the file is left, the lock is not"
    with lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
        assert Lock(lock.path).owner() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not lock.path.exists()


def test_a_lock_removed_between_opening_and_locking_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        original(descriptor, operation)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with Lock(tmp_path / "lock"):
        assert len(calls) == 2 and (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    "record, free",
    [
        ({"host": "here", "pid": 2**22 + 1, "started": 5}, True),
        ({"host": "here", "pid": os.getpid(), "started": -1}, True),
        ({"host": "elsewhere", "pid": 1, "started": 5}, False),
        (None, True),
    ],
    ids=["dead", "number used again", "another host", "unwritten"],
)
def test_where_the_file_system_cannot_lock_the_record_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict | None, free: bool
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    (tmp_path / "lock").write_text("" if record is None else json.dumps(record))
    if free:
        with Lock(tmp_path / "lock"), pytest.raises(RequestError, match=f"process {os.getpid()} on here"):
            Lock(tmp_path / "lock").check()
    else:
        with pytest.raises(RequestError, match="process 1 on elsewhere"):
            Lock(tmp_path / "lock").__enter__()
