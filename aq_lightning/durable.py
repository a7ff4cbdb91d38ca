"""Files and directories that a killed process leaves whole or absent, and whose damage is found.

A durable thing is written under a name ending in ``.partial`` beside its own, synced, renamed, and its directory synced
in turn; a note of where a run stands is only renamed. A JSON file carries the sha256 of its content; a sealed directory
carries a ``manifest.json`` of that kind with the size and sha256 of every file in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_SHA = "sha256"
_CHUNK = 2**24  # bytes
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, lasting: bool = True) -> None:
    """A whole file or none; one that need not outlast a failure of power, which is not waited for, may be damaged by
    it, and is gone for a moment."""
    partial = partial_of(path)
    with _open(partial, lasting) as descriptor:
        _write(descriptor, text.encode())
    if not lasting:
        path.unlink(missing_ok=True)  # replacing a file, ext4 waits for the disk
    os.replace(partial, path)
    if lasting:
        sync(path.parent)


def write_json(path: Path, content: Mapping[str, Any], lasting: bool = True) -> None:
    """A JSON object with its checksum; the inverse of :func:`read_json`."""
    write_text(path, json.dumps({**content, _SHA: _checksum(content)}, indent=2) + "\n", lasting)


def read_json(path: Path) -> dict[str, Any] | None:
    """What :func:`write_json` wrote; None where there is no such file or not a bit of it may be believed."""
    try:
        content = json.loads(path.read_bytes())
        kept = content.pop(_SHA)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if kept == _checksum(content) else None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A synced safetensors file; the same content gives the same bytes, and no second copy of a tensor is made.

    Args:
        path: where; not atomic, for directories that are renamed as a whole.
        tensors: by name, anywhere.
        metadata: notes in the header.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every tensor stays aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with _open(path) as descriptor:
        _write(descriptor, len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].detach()
            for part in tensor.reshape(-1).split(_CHUNK // tensor.element_size()) if tensor.numel() else ():
                _write(descriptor, part.cpu().contiguous().view(torch.uint8).numpy().data)


def partial_of(path: Path) -> Path:
    """The name under which ``path`` is prepared."""
    return path.with_name(path.name + _PARTIAL)


def fresh(target: Path) -> Path:
    """An empty directory in which ``target`` is prepared; what a killed process left there goes."""
    partial = partial_of(target)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def seal(target: Path, notes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gives the directory that :func:`fresh` made its manifest, which it returns, and its name: ``target`` appears."""
    partial = partial_of(target)
    content = {**(notes or {}), "files": listing(partial)}
    write_json(partial / MANIFEST, content)
    for path in partial.iterdir():
        sync(path)
    sync(partial)
    os.replace(partial, target)
    sync(target.parent)
    sync(target.parent.parent)  # which may have gained the parent
    return content


@contextmanager
def sealed(target: Path, notes: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` if the body succeeds and vanishes if it raises."""
    partial = fresh(target)
    try:
        yield partial
        seal(target, notes)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """A directory, under another name first so that it goes as a whole; or a file."""
    if path.is_dir() and not path.is_symlink():
        doomed = partial_of(path)
        if path.suffix != _PARTIAL:
            remove(doomed)
            path = path.rename(doomed)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def listing(directory: Path) -> dict[str, dict[str, int | str]]:
    """Size and sha256 of every file of a flat directory."""
    return {
        path.name: {"bytes": path.stat().st_size, _SHA: digest(path)}
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST
    }


def manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a sealed directory whose files are all as they were written; None otherwise."""
    content = read_json(directory / MANIFEST)
    return content if content is not None and intact(directory, content["files"]) else None


def intact(directory: Path, files: Mapping[str, Mapping[str, int | str]]) -> bool:
    """Whether a directory has every file of a :func:`listing`, byte for byte."""
    paths = [(directory / name, expected) for name, expected in files.items()]
    return all(path.is_file() and path.stat().st_size == each["bytes"] for path, each in paths) and all(
        digest(path) == each[_SHA] for path, each in paths
    )


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def _open(path: Path, lasting: bool = True) -> Iterator[int]:
    """A descriptor of a new file, synced at the end if it is to last; a file that fails to be written vanishes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    with ExitStack() as undo:
        undo.callback(path.unlink, missing_ok=True)
        try:
            yield descriptor
            if lasting:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        undo.pop_all()


def _write(descriptor: int, content: bytes | memoryview) -> None:
    """All of ``content``; a disk that fills up takes only a part at first."""
    rest = memoryview(content)  # of bytes
    while rest:
        rest = rest[os.write(descriptor, rest) :]
