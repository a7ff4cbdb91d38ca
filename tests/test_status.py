"""What is said of a run at work, whose files come and go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from aq_lightning.status import status_of


def test_what_goes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory just before it is opened, and a file just behind that."""
    run = tmp_path / "run"
    for name in ("inside/block.00000001", "streams"):
        (run / name).mkdir(parents=True)
        (run / name / "file").write_bytes(b"x" * 10**6)
    (run / "config.yaml").write_text("model: {pretrained: somewhere, scheme: w4a16}")
    kept, scandir, gone = status_of(run), os.scandir, []

    def racing(path: str | int):
        name = "" if isinstance(path, int) else Path(path).name
        if name == "inside" and not gone.count("directory"):
            gone.append("directory")
            shutil.rmtree(run / "inside")
        found = list(scandir(path))
        if name == "streams":
            (run / "streams/file").unlink()
            gone.append("file")
        return _Entries(found)

    monkeypatch.setattr(os, "scandir", racing)
    said = status_of(run)
    assert sorted(gone) == ["directory", "file"] and "stopped" in said and "2.0 MB" in kept and "0.0 MB" in said


class _Entries:
    """What ``os.scandir`` returns."""

    def __init__(self, found: list[os.DirEntry]) -> None:
        self.found = iter(found)

    def __iter__(self):
        return self

    def __next__(self) -> os.DirEntry:
        return next(self.found)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass
