"""What is written is whole or absent, and damage is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aq_lightning import durable

TENSORS = {
    "b": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "none": torch.empty(0, 4, dtype=torch.int64),
    "turned": torch.arange(12, dtype=torch.int32).reshape(3, 4).T,
    "bf": torch.linspace(-1, 1, 7).bfloat16(),
}


def test_tensors_are_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    durable.save_tensors(tmp_path / "ours", TENSORS, {"note": "x"})
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
               for name, tensor in TENSORS.items())  # fmt: skip
    plain = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(plain, tmp_path / "theirs", {"note": "x"})
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_tensors_larger_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_CHUNK", 64)
    written = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: written(descriptor, content[:7]))
    large = {"x": torch.randn(100), "y": torch.randn(33, dtype=torch.float64)}
    durable.save_tensors(tmp_path / "file", large)
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in large.items()), "short writes are gone on with"


def test_the_order_of_tensors_and_notes_does_not_matter(tmp_path: Path) -> None:
    durable.save_tensors(tmp_path / "one", TENSORS, {"a": "1", "b": "2"})
    durable.save_tensors(tmp_path / "two", dict(reversed(TENSORS.items())), {"b": "2", "a": "1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def make(target: Path) -> None:
    with durable.sealed(target, {"after": None}) as partial:
        durable.save_tensors(partial / "tensors", TENSORS)
        durable.write_text(partial / "text", "content")


def test_sealed_directory(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b")
    content = durable.manifest(tmp_path / "a" / "b")
    assert content["after"] is None and content["files"].keys() == {"tensors", "text"}
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


@given(data=st.data())
def test_every_damage_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any file of a sealed directory cut, flipped in one bit, or gone."""
    target = tmp_path_factory.mktemp("sealed") / "target"
    make(target)
    file = target / data.draw(st.sampled_from(["tensors", "text", "manifest.json"]))
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flipped", "gone"]))
    place = data.draw(st.integers(0, len(content) - 2))  # the last byte of a manifest is a newline
    if kind == "cut":
        file.write_bytes(content[:place])
    elif kind == "flipped":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
    else:
        file.unlink()
    left = durable.manifest(target)
    assert left is None or (file.name == "manifest.json" and left["files"] == durable.listing(target)), "white space"


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"sha256": 1}', "[" * 10**5, '{"a": 1}', "\x00\xff"])
def test_what_is_no_such_file_is_no_content(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    assert durable.read_json(tmp_path / "file") is None


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.floats(allow_nan=False) | st.text(), st.lists)))
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, content: dict) -> None:
    path = tmp_path_factory.mktemp("json") / "file"
    content.pop("sha256", None)
    durable.write_json(path, content)
    assert durable.read_json(path) == content


def test_what_need_not_last_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    durable.write_json(tmp_path / "file", {"a": 1}, lasting=False)
    assert durable.read_json(tmp_path / "file") == {"a": 1} and not synced
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    durable.write_json(tmp_path / "file", {"a": 2})
    assert durable.read_json(tmp_path / "file") == {"a": 2} and len(synced) == 2, "the file and its directory"


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), durable.sealed(tmp_path / "target") as partial:
        durable.write_text(partial / "text", "content")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
