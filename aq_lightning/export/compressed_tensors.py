"""The formats ``pack-quantized`` and ``int-quantized`` of compressed-tensors: transformers and vLLM load them.

Packed, a weight ``<name>`` of shape (N, K) with b-bit codes in G groups becomes

========================  ==========================  ==================================================================
``<name>_packed``         int32 (N, words(K))         codes ``0 … 2^b − 1``, packed along K
``<name>_scale``          storage dtype (N, G)        w = (u − z) s
``<name>_zero_point``     int32 (words(N), G)         z, packed along N; present if and only if the grid is asymmetric
``<name>_shape``          int64 (2,)                  N, K
========================  ==========================  ==================================================================

As plain integers (8 bits, symmetric, one scale per channel) it becomes ``<name>`` int8 (N, K), ``u − 128``, and
``<name>_scale``. :func:`format_of` says which is written.

Other tensors are stored as they are. A model with online products, which no client of the format can run, gets another
``quant_method`` around its section, and files of another name: transformers only warns of an unknown method, and would
go on with random weights if it found any file of its own. Words are those of :mod:`aq_lightning.kernels.layout`; which
layout was used is noted in the header of each safetensors file, for nothing in the format says it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors_config import (
    INTEGERS,
    METHOD,
    PACKED,
    format_of,
    own_config,
    quantization_config,
    scheme_of,
    split_config,
)
from aq_lightning.export.directory import Description, StoredTensors, read_config, write_directory
from aq_lightning.kernels.layout import LAYOUTS, Layout, pack_words, same_in_both, unpack_words, words
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid, Scheme
from aq_lightning.transforms.online import carrier

LAYOUT_NOTE = "aq_lightning.layout"
_PARTS = ("_packed", "_scale", "_zero_point", "_shape")


def compress(name: str, tensor: QTensor, layout: Layout = "padded") -> dict[str, Tensor]:
    """The stored tensors of a weight; the inverse of :func:`decompress`.

    Raises:
        RequestError: the format cannot say it (a zero point off the middle of a symmetric grid), or no client could
            use it (a scale that is not finite and positive).
    """
    _check(name, tensor)
    grid = tensor.grid
    stored = {
        f"{name}_packed": pack_words(tensor.codes, grid.bits, layout),
        f"{name}_scale": tensor.scale.contiguous(),
        f"{name}_shape": torch.tensor(tensor.codes.shape, dtype=torch.int64),
    }
    if not grid.symmetric:
        stored[f"{name}_zero_point"] = pack_words(tensor.zero.T, grid.bits, layout).T.contiguous()
    return stored


def decompress(name: str, tensors: Mapping[str, Tensor], grid: Grid, layout: Layout | None = None) -> QTensor:
    """The weight in its stored tensors; the inverse of :func:`compress`.

    Args:
        name: name of the weight, without the parts' suffixes.
        tensors: holds at least the weight's parts.
        grid: bits, group size and symmetry.
        layout: how words are filled; None infers it from the number of words.

    Raises:
        RequestError: a part is missing, too many or of another shape than the grid gives, or the number of words
            leaves the layout open.
    """
    expected = {f"{name}{part}" for part in _PARTS if part != "_zero_point" or not grid.symmetric}
    present = {f"{name}{part}" for part in _PARTS} & tensors.keys()
    if present != expected:
        raise RequestError(
            f"A weight with symmetric={grid.symmetric} is stored as {sorted(expected)}, got {sorted(present)}: "
            "check the scheme."
        )
    rows, columns = tensors[f"{name}_shape"].tolist()
    scale = tensors[f"{name}_scale"]
    if tuple(scale.shape) != (rows, grid.groups(columns)):
        raise RequestError(
            f"The scales of {name} have shape {(rows, grid.groups(columns))}, got {tuple(scale.shape)}: "
            "check the group size."
        )
    packed = tensors[f"{name}_packed"]
    if grid.symmetric:
        found = _layout_of(name, [(columns, packed.shape[1])], grid.bits, layout)
        zero = torch.full(scale.shape, grid.levels // 2, dtype=torch.uint8, device=packed.device)
    else:
        packed_zero = tensors[f"{name}_zero_point"]
        found = _layout_of(name, [(columns, packed.shape[1]), (rows, packed_zero.shape[0])], grid.bits, layout)
        zero = unpack_words(packed_zero.T, grid.bits, rows, found).T.contiguous()
    return QTensor(unpack_words(packed, grid.bits, columns, found), scale, zero, grid)


def integers(name: str, tensor: QTensor) -> dict[str, Tensor]:
    """The stored tensors of a symmetric 8-bit weight as plain integers; refuses what :func:`compress` does."""
    _check(name, tensor)
    return {name: (tensor.codes ^ 128).view(torch.int8), f"{name}_scale": tensor.scale.contiguous()}


def of_integers(weight: Tensor, scale: Tensor, grid: Grid) -> QTensor:
    """The weight in plain integers; the inverse of :func:`integers`."""
    codes = weight.view(torch.uint8) ^ 128
    return QTensor(
        codes, scale, torch.full(scale.shape, grid.levels // 2, dtype=torch.uint8, device=scale.device), grid
    )


def pack(weights: Mapping[str, Tensor | QTensor], layout: Layout, form: str = PACKED) -> dict[str, Tensor]:
    """Stored tensors of quantized and other weights together; :func:`unpack` is the inverse of the packed form."""
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not isinstance(value, QTensor):
            stored[name] = value
        else:
            stored |= integers(name, value) if form == INTEGERS else compress(name, value, layout)
    return stored


def unpack(stored: Mapping[str, Tensor], grid: Grid, layout: Layout) -> dict[str, Tensor | QTensor]:
    """Weights from their stored tensors; the inverse of :func:`pack`."""
    names = [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]
    parts = {f"{name}{part}" for name in names for part in _PARTS}
    others: dict[str, Tensor | QTensor] = {name: stored[name] for name in stored if name not in parts}
    return others | {name: decompress(name, stored, grid, layout) for name in names}


def write(
    out: Path,
    source_config: Mapping[str, Any],
    shards: Iterable[Mapping[str, Tensor | QTensor]],
    scheme: Scheme,
    *,
    layout: Layout = "padded",
    ignore: Sequence[str] = ("lm_head",),
    extra_files: Iterable[Path] = (),
) -> None:
    """Writes a checkpoint directory atomically; the inverse of :func:`read`.

    Args:
        out: directory to make; may exist if empty.
        source_config: ``config.json`` of the model; a ``quantization_config`` in it is replaced.
        shards: tensors of one file each, consumed lazily; tied tensors are left out by the caller.
        scheme: integers of every quantized weight.
        layout: "padded" for transformers with compressed-tensors up to 0.17, "dense" for newer ones and vLLM; they
            differ for 3, 5, 6 and 7 bits.
        ignore: module paths or ``re:`` patterns of the linears in full precision.
        extra_files: tokenizer, generation configuration, chat template and the like, to be copied.

    Raises:
        RequestError: ``out`` has content, a weight has another grid than the scheme's, or see
            :func:`~aq_lightning.export.directory.write_directory` and :func:`compress`.
    """
    section = quantization_config(scheme, ignore)

    def description(names: Collection[str]) -> Description:
        online = sorted({carrier(name) for name in names} - {""})
        if not online and scheme.key_value is None:
            return Description({**source_config, "quantization_config": section})
        refused = {"transformers_weights": f"none, for what it does online runs in {METHOD} only"}
        own = own_config(section, online, scheme)
        return Description({**source_config, **refused, "quantization_config": own}, METHOD)

    stored = map(partial(_stored, scheme=scheme, layout=layout), shards)
    write_directory(out, description, stored, {LAYOUT_NOTE: layout}, extra_files)


class Checkpoint(Mapping[str, "QTensor | Tensor"]):
    """The weights of a checkpoint by name, each read from its file when asked for."""

    def __init__(self, tensors: StoredTensors, grid: Grid) -> None:
        self._tensors = tensors
        self._grid = grid
        quantized = {name.removesuffix("_packed") for name in tensors if name.endswith("_packed")}
        quantized |= {name for name in tensors if f"{name}_scale" in tensors}  # plain integers
        parts = {f"{name}{part}" for name in quantized for part in _PARTS}
        self._quantized = {name: name in quantized for name in [*(set(tensors) - parts), *quantized]}

    def __getitem__(self, name: str) -> QTensor | Tensor:
        if not self._quantized[name]:
            return self._tensors[name]
        if name in self._tensors:
            return of_integers(self._tensors[name], self._tensors[f"{name}_scale"], self._grid)
        layout = self._tensors.metadata(f"{name}_packed").get(LAYOUT_NOTE)
        return decompress(name, self._tensors, self._grid, cast("Layout | None", layout))  # which refuses others

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._quantized))

    def __len__(self) -> int:
        return len(self._quantized)


def read(directory: Path) -> tuple[Scheme, Checkpoint]:
    """The scheme and, lazily, the weights of a checkpoint directory; the inverse of :func:`write`.

    Raises:
        RequestError: no checkpoint of this format is there, or its scheme is not understood.
    """
    config = read_config(directory)
    if "quantization_config" not in config:
        raise RequestError(f"A quantized checkpoint's config.json has a quantization_config, got none in {directory}.")
    section, online, cache = split_config(config["quantization_config"])
    scheme = replace(scheme_of(section), **cache)
    own = section is not config["quantization_config"]
    checkpoint = Checkpoint(StoredTensors(directory, METHOD) if own else StoredTensors(directory), scheme.weight)
    found = sorted({carrier(name) for name in checkpoint} - {""})
    if found != online:
        raise RequestError(
            f"A checkpoint holds the online products that its config.json names, got {found[:3]} … for {online[:3]} … "
            f"in {directory}: write it again."
        )
    return scheme, checkpoint


class DenseTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint, dequantized when asked for; those of floating point are in ``dtype``."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        value = self._checkpoint[name]
        if isinstance(value, QTensor):
            return value.dequantize(self._dtype)
        return value.to(self._dtype) if value.is_floating_point() else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    def __len__(self) -> int:
        return len(self._checkpoint)


def load_dense(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of a checkpoint with dequantized weights; floating-point tensors are in ``dtype``."""
    return dict(DenseTensors(read(directory)[1], dtype))


def _stored(shard: Mapping[str, Tensor | QTensor], scheme: Scheme, layout: Layout) -> dict[str, Tensor]:
    for name, value in shard.items():
        if isinstance(value, QTensor) and value.grid != scheme.weight:
            raise RequestError(f"Every weight has the scheme's grid {scheme.weight}, got {value.grid} for {name}.")
    return pack(shard, layout, format_of(scheme))


def _check(name: str, tensor: QTensor) -> None:
    grid, scale = tensor.grid, tensor.scale
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise RequestError(f"Scales are finite and positive, got others in {name}: store them in a wider dtype.")
    if grid.symmetric and bool((tensor.zero != grid.levels // 2).any()):
        raise RequestError(
            f"The zero point of a symmetric grid of {grid.bits} bits is {grid.levels // 2}, got others in {name}: "
            "use an asymmetric scheme."
        )


def _layout_of(name: str, counts: Sequence[tuple[int, int]], bits: int, layout: Layout | None) -> Layout:
    """The layout in which each row of codes takes its number of words; ``counts`` pairs (codes, words)."""
    candidates = LAYOUTS if layout is None else (layout,)
    fitting = [one for one in candidates if all(words(codes, bits, one) == count for codes, count in counts)]
    if not fitting:
        raise RequestError(
            f"Rows of {bits}-bit codes fill their words in layout {' or '.join(candidates)}, got (codes, words) = "
            f"{counts} in {name}: check the bits and the layout."
        )
    if len(fitting) > 1 and not all(same_in_both(codes, bits) for codes, _ in counts):
        raise RequestError(f"The number of words must tell the layout, got one that fits both in {name}: name it.")
    return fitting[0]
