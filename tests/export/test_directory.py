"""A model directory is whole or absent, and takes one shard of memory."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.export.directory import Description, StoredTensors, gathered, read_config, write_directory


def shards(count: int) -> Iterator[dict[str, Tensor]]:
    for k in range(count):
        yield {f"{k}.weight": torch.full((2, 3), k), f"{k}.bias": torch.ones(3)}


def test_one_shard(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    write_directory(out, {"dtype": "float16"}, shards(1), {"note": "x"})
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert read_config(out) == {"dtype": "float16"}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


def test_several_shards(tmp_path: Path) -> None:
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    out = tmp_path / "out"
    out.mkdir()  # empty: allowed
    write_directory(out, {}, shards(3), {}, [extra])
    weights = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    names = ["config.json", *weights, "model.safetensors.index.json", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 3 * (2 * 3 * 8 + 3 * 4)}
    assert index["weight_map"] == {f"{k}.{part}": weights[k] for k in range(3) for part in ("weight", "bias")}
    stored = StoredTensors(out)
    assert len(stored) == 6
    assert all(torch.equal(stored[f"{k}.weight"], torch.full((2, 3), k)) for k in range(3))
    assert stored.metadata("1.bias") == {"format": "pt"}


@pytest.mark.parametrize("count", [1, 3])
def test_weights_under_another_name(tmp_path: Path, count: int) -> None:
    """What the configuration says, and how the files are called, may depend on the tensors that came."""
    write_directory(tmp_path / "out", lambda names: Description({"n": sorted(names)}, "other"), shards(count), {})
    weights = ["other.safetensors"] if count == 1 else [f"other-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    index = ["other.safetensors.index.json"] if count > 1 else []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(["config.json", *weights, *index])
    stored = StoredTensors(tmp_path / "out", "other")
    assert read_config(tmp_path / "out")["n"] == sorted(stored)
    assert all(torch.equal(stored[f"{k}.weight"], torch.full((2, 3), k)) for k in range(count))
    with pytest.raises(RequestError, match=r"holds model\.safetensors or"):
        StoredTensors(tmp_path / "out")


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    write_directory(tmp_path / "out", {}, shards(2), {})
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "ordinary").stat().st_mode}


def test_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def watched() -> Iterator[dict[str, Tensor]]:
        for k in range(4):
            assert all(ref() is None for ref in alive)
            tensor = torch.zeros(5)
            alive.append(weakref.ref(tensor))
            yield {str(k): tensor}
            del tensor

    gc.disable()  # freed by reference counts alone
    try:
        write_directory(tmp_path / "out", {}, watched(), {})
    finally:
        gc.enable()
    assert len(alive) == 4


def test_a_failing_shard_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Tensor]]:
        yield from shards(2)
        assert (tmp_path / "out.partial" / "0.part").is_file() and not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "out", {}, broken(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "7.part").write_text("half")
    write_directory(tmp_path / "out", {}, shards(1), {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "7.part").exists()


def test_refusals(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).touch()
    twice = [{"a": torch.ones(1)}, {"a": torch.ones(1)}]
    for content, extra, message in [
        (shards(0), [], "at least 1 shard of tensors, got 0"),
        (twice, [], r"belongs to one shard, got \['a'\] in two"),
        (shards(1), [tmp_path / "absent.json"], r"must exist, got .*absent\.json"),
        (shards(1), [tmp_path / "model.safetensors"], "neither weights"),
        (shards(1), [tmp_path / "config.json"], r"neither weights, config\.json"),
    ]:
        with pytest.raises(RequestError, match=message):
            write_directory(out, {}, content, {}, extra)
        assert not out.exists() and not out.with_name("out.partial").exists()


@pytest.mark.parametrize("content", ["file", "folder"])
def test_refuses_to_overwrite(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    if content == "folder":
        out.mkdir()
    kept = out if content == "file" else out / "precious"
    kept.write_text("mine")
    with pytest.raises(RequestError, match="must be new or empty, got .*out"):
        write_directory(out, {}, shards(1), {})
    assert kept.read_text() == "mine"


def test_reading_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds model\.safetensors or model\.safetensors\.index\.json, got"):
        StoredTensors(tmp_path)


def test_shards_are_gathered_up_to_the_limit() -> None:
    shards = [{f"t{i}": torch.full((i + 1,), float(i))} for i in range(6)]  # 4, 8, 12, 16, 20, 24 bytes
    files = list(gathered(shards, limit=24))
    assert [sorted(file) for file in files] == [["t0", "t1", "t2"], ["t3"], ["t4"], ["t5"]]
    assert [list(file) for file in gathered(shards, limit=10**6)] == [[f"t{i}" for i in range(6)]]
