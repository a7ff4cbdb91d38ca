"""A cached tensor is the computed one, or it is computed again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aq_lightning.data.cache import cache_directory, cached

KEY: dict[str, str | int] = {"data": "python", "seed": 1}
VALUE = torch.arange(6).view(2, 3)


def _counted() -> tuple[list[int], Callable[[], Tensor]]:
    calls: list[int] = []

    def compute() -> Tensor:
        calls.append(1)
        return VALUE.clone()

    return calls, compute


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_second_request_is_not_computed(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(6).view(3, 2).T.to(dtype)
    kept = cached(KEY, tmp_path / "new" / "deep", lambda: value)
    again = cached(KEY, tmp_path / "new" / "deep", lambda: pytest.fail("computed twice"))
    assert kept.dtype == again.dtype == dtype
    assert torch.equal(kept, value) and torch.equal(again, value)
    assert [path.suffix for path in (tmp_path / "new" / "deep").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("other", [{"seed": 2}, {"seed": "1"}, {"data": "pythons"}, {"length": 3}])
def test_any_other_key_is_another_file(tmp_path: Path, other: dict[str, str | int]) -> None:
    cached(KEY, tmp_path, lambda: VALUE)
    assert torch.equal(cached(KEY | other, tmp_path, lambda: VALUE + 1), VALUE + 1)
    assert torch.equal(cached(dict(reversed(KEY.items())), tmp_path, lambda: VALUE + 2), VALUE)


def test_damaged_file_is_never_trusted(tmp_path: Path) -> None:
    """Every truncation and every flipped byte gives the right tensor, and leaves a sound file."""
    calls, compute = _counted()
    cached(KEY, tmp_path, compute)
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    damaged = [sound[:end] for end in range(len(sound))]
    damaged += [sound[:at] + bytes([sound[at] ^ 0x15]) + sound[at + 1 :] for at in range(len(sound))]
    for content in damaged:
        path.write_bytes(content)
        assert torch.equal(cached(KEY, tmp_path, compute), VALUE)
    assert len(calls) == len(damaged) + 1
    path.write_bytes(sound[:-1])
    cached(KEY, tmp_path, compute)
    assert path.read_bytes() == sound


def test_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "disk full", str(source))

    monkeypatch.setattr("os.replace", refuse)
    with pytest.warns(UserWarning, match="disk full") as caught:
        for seed in range(3):
            assert torch.equal(cached(KEY | {"seed": seed}, tmp_path, lambda: VALUE), VALUE)
    assert len(caught) == 1
    assert not list(tmp_path.iterdir())


def test_unwritable_directory_warns_once_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    calls, compute = _counted()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (1, 1, 2):
            assert torch.equal(cached(KEY | {"seed": seed}, tmp_path / "file" / "windows", compute), VALUE)
    assert len(calls) == 3
    assert len(caught) == 1 and "AQ_LIGHTNING_CACHE" in str(caught[0].message)


def test_directory_is_the_configured_one_then_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQ_LIGHTNING_CACHE", "/environment")
    assert cache_directory("/configured") == Path("/configured")
    assert cache_directory(None) == Path("/environment")
    monkeypatch.delenv("AQ_LIGHTNING_CACHE")
    assert cache_directory(None) == Path.home() / ".cache" / "aq_lightning"
