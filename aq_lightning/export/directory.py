"""A Hugging Face model directory, written whole or not at all, and read lazily.

::

    config.json
    model.safetensors                                 one shard, or
    model-00001-of-00003.safetensors …                several, and
    model.safetensors.index.json                      {"metadata": {"total_size"}, "weight_map": {tensor: file}}
    tokenizer.json, generation_config.json, …         copied

Everything is written and synced in ``<name>.partial`` beside the target, which is then renamed: the target either does
not exist or is complete. A ``.partial`` directory that a killed run left behind is removed by the next one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aq_lightning.durable import partial_of, save_tensors, sync
from aq_lightning.errors import RequestError
from aq_lightning.models.files import read_object
from aq_lightning.models.weights import INDEX, SINGLE, with_stem
from aq_lightning.models.weights import StoredTensors as StoredTensors

CONFIG = "config.json"


@dataclass(frozen=True)
class Description:
    """What a model directory says of its tensors."""

    config: Mapping[str, Any]
    """Content of ``config.json``."""
    stem: str = "model"
    """First part of the weights' file names; transformers finds none under another."""


def write_directory(
    out: Path,
    config: Mapping[str, Any] | Callable[[Collection[str]], Description],
    shards: Iterable[Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    extra_files: Iterable[Path] = (),
) -> None:
    """Writes a model directory atomically.

    Args:
        out: the directory to make; may exist if empty.
        config: content of ``config.json``; or, where it depends on what is stored, a function of the tensors' names.
        shards: tensors of one safetensors file each; consumed lazily, one shard in memory at a time.
        metadata: header of every safetensors file, ``{"format": "pt"}`` being added as transformers requires.
        extra_files: files to copy beside the weights, under their own names.

    Raises:
        RequestError: ``out`` has content; no shard; a tensor occurs twice; an extra file is missing or has the name of
            a file written here.
    """
    extra_files = tuple(extra_files)
    _check_extra(extra_files)
    with atomic(out) as partial:
        for source in extra_files:
            shutil.copyfile(source, partial / source.name)
        files = _write_shards(partial, shards, {"format": "pt", **metadata})
        description = config(files.keys()) if callable(config) else Description(config)
        _name_shards(partial, files, description.stem)
        _write_json(partial / CONFIG, description.config)


@contextmanager
def verified(out: Path) -> Iterator[Path]:
    """A directory for the body to write and check: it becomes ``out`` if the body succeeds.

    Otherwise what was written stays as ``<name>.unverified`` beside ``out``, until it is written again.

    Raises:
        RequestError: ``out`` has content.
    """
    _check_vacant(out)
    unverified = out.with_name(out.name + ".unverified")
    if unverified.exists():
        shutil.rmtree(unverified)
    yield unverified
    unverified.replace(out)
    sync(out.parent)


def read_config(directory: Path) -> dict[str, Any]:
    """Content of ``config.json``.

    Raises:
        RequestError: there is none.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise RequestError(f"A model directory holds {CONFIG}, got {directory}: give another path.")
    return read_object(path)


def gathered(shards: Iterable[Mapping[str, Tensor]], limit: int = 4 * 2**30) -> Iterator[dict[str, Tensor]]:
    """Joins consecutive shards while they fit in one file.

    Args:
        shards: tensors by name.
        limit: bytes of tensors in a file, unless one shard alone is larger.
    """
    file: dict[str, Tensor] = {}
    for shard in shards:
        size = sum(tensor.nbytes for tensor in [*file.values(), *shard.values()])
        if file and size > limit:
            yield file
            file = {}
        file.update(shard)
    yield file


@contextmanager
def atomic(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes ``out`` if the body succeeds and vanishes if it raises."""
    _check_vacant(out)
    partial = partial_of(out)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, partial)
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        partial.replace(out)
        undo.pop_all()
    sync(out.parent)


def _check_vacant(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RequestError(f"The output directory must be new or empty, got {out}: choose another or delete it.")


def _write_shards(
    folder: Path, shards: Iterable[Mapping[str, Tensor]], metadata: dict[str, str]
) -> dict[str, tuple[int, int]]:
    """Writes the shards under temporary names, as their number is unknown: tensor → shard number from 0, and bytes."""
    files: dict[str, tuple[int, int]] = {}
    count = 0
    for shard in shards:
        twice = files.keys() & shard.keys()
        if twice:
            raise RequestError(f"A tensor belongs to one shard, got {sorted(twice)} in two: write each once.")
        save_tensors(folder / f"{count}.part", shard, metadata)
        files |= {name: (count, tensor.nbytes) for name, tensor in shard.items()}
        count += 1
        del shard  # free it before the next is made
    if count == 0:
        raise RequestError("A model directory holds at least 1 shard of tensors, got 0: pass the model's tensors.")
    return files


def _name_shards(folder: Path, files: Mapping[str, tuple[int, int]], stem: str) -> None:
    """Names the shards that :func:`_write_shards` left, and writes the index if there are several."""
    count = len(list(folder.glob("*.part")))
    names = [f"{stem}-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    names = names if count > 1 else [with_stem(SINGLE, stem)]
    for k, name in enumerate(names):
        (folder / f"{k}.part").rename(folder / name)
    if count > 1:
        weight_map = {tensor: names[k] for tensor, (k, _) in files.items()}
        total_size = sum(size for _, size in files.values())
        _write_json(folder / with_stem(INDEX, stem), {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _check_extra(files: tuple[Path, ...]) -> None:
    taken = {CONFIG, INDEX}
    for path in files:
        if not path.is_file():
            raise RequestError(f"Extra files must exist, got {path}: leave it out or correct the path.")
        if path.name in taken or path.suffix in (".safetensors", ".part"):
            raise RequestError(f"Extra files are neither weights, {CONFIG}, nor given twice, got {path}: leave it out.")
        taken.add(path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
