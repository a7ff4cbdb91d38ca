"""The GPTQ format, as AutoGPTQ and GPTQModel write it: vLLM, SGLang and transformers (with GPTQModel) load it.

A weight ``<linear>.weight`` of shape (N, K) with b-bit codes in G groups of g becomes

====================  =====================  ===========================================================================
``<linear>.qweight``  int32 (K b / 32, N)    codes ``0 … 2^b − 1``, packed along K: code k of column n starts at bit
                                             ``k b mod 32`` of word ``k b // 32``, the least significant first
``<linear>.qzeros``   int32 (G, N b / 32)    zero points, packed along N: ``z − 1`` in version 1, z in version 2
``<linear>.scales``   16 bits (G, N)         w = (u − z) s
``<linear>.g_idx``    int32 (K,)             group of each input: ``k // g``
====================  =====================  ===========================================================================

Version 1 (``gptq``) cannot say z = 0: ``−1`` wraps to the greatest code, and a loader that adds 1 to whole words
carries into the neighbour. It is therefore written for symmetric grids only, whose z is ``2^(b−1)`` throughout; version
2 (``gptq_v2``) holds any. Other tensors are stored as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.export.base import (
    Checkpoint,
    Subject,
    Weights,
    check_bits,
    check_sixteen_bits,
    check_weights_only,
    check_word_shapes,
    stem,
)
from aq_lightning.export.directory import StoredTensors, read_config, write_directory
from aq_lightning.kernels.layout import pack_words, unpack_words
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid, Scheme

Version = Literal["gptq", "gptq_v2"]
BITS = (2, 3, 4, 8)
_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def check(subject: Subject, version: Version) -> None:
    """
    Raises:
        RequestError: activations, bits, asymmetry (version 1), dtype or shapes that the format cannot hold.
    """
    check_weights_only(subject, version)
    check_bits(subject, BITS, version)
    check_sixteen_bits(subject, version)
    if version == "gptq" and not subject.scheme.weight.symmetric:
        raise RequestError(
            f"Version 1 of GPTQ holds symmetric weights (it stores z − 1, and z may be 0), got {subject.scheme}: "
            "export gptq_v2, or awq for 4 bits."
        )
    if len(subject.ignore) > 1:
        raise RequestError(
            f"GPTQ leaves only the output head in full precision, got {', '.join(subject.ignore)}: "
            "export compressed-tensors."
        )
    check_word_shapes(subject, version, inputs=32, outputs=32)


def compress(name: str, tensor: QTensor, version: Version) -> dict[str, Tensor]:
    """The stored tensors of a weight; the inverse of :func:`decompress`."""
    linear, bits = stem(name, version), tensor.grid.bits
    zero = tensor.zero - 1 if version == "gptq" else tensor.zero  # (N, G)
    columns, groups = tensor.codes.shape[1], tensor.scale.shape[1]
    return {
        f"{linear}.qweight": pack_words(tensor.codes, bits, "dense").T.contiguous(),
        f"{linear}.qzeros": pack_words(zero.T, bits, "dense"),
        f"{linear}.scales": tensor.scale.T.contiguous(),
        f"{linear}.g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }


def decompress(name: str, tensors: Mapping[str, Tensor], grid: Grid, version: Version) -> QTensor:
    """The weight in its stored tensors; the inverse of :func:`compress`.

    Raises:
        RequestError: inputs are not in the order of their groups.
    """
    qweight, qzeros, scales, index = (tensors[stem(name, version) + part] for part in _PARTS)
    groups, rows = scales.shape
    columns = len(index)
    if not torch.equal(index, torch.arange(columns, dtype=index.dtype) // (columns // groups)):
        raise RequestError(f"Inputs lie in the order of their groups, got another g_idx in {name}: requantize.")
    zero = unpack_words(qzeros, grid.bits, rows, "dense").T  # (N, G)
    return QTensor(
        codes=unpack_words(qweight.T, grid.bits, columns, "dense"),
        scale=scales.T.contiguous(),
        zero=(zero + 1 if version == "gptq" else zero).contiguous(),
        grid=grid,
    )


def pack(weights: Weights, scheme: Scheme, version: Version) -> dict[str, Tensor]:
    """Stored tensors of quantized and other weights together."""
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        stored |= compress(name, value, version) if isinstance(value, QTensor) else {name: value}
    return stored


def write(
    out: Path,
    source_config: Mapping[str, Any],
    shards: Iterable[Weights],
    scheme: Scheme,
    *,
    version: Version,
    ignore: Sequence[str] = ("lm_head",),
    extra_files: Iterable[Path] = (),
) -> None:
    """Writes a checkpoint directory atomically; the inverse of :func:`read`.

    Args:
        out: directory to make; may exist if empty.
        source_config: ``config.json`` of the model.
        shards: tensors of one file each, packed or not, consumed lazily.
        scheme: integers of every quantized weight.
        version: of the format.
        ignore: the output head, which the format leaves in full precision without naming it.
        extra_files: tokenizer and the like, to be copied.
    """
    grid = scheme.weight
    quantization = {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "desc_act": False,
        "sym": grid.symmetric,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["aq_lightning:0.1.0"]},
    }
    config = {**source_config, "quantization_config": quantization}
    write_directory(out, config, (pack(shard, scheme, version) for shard in shards), {}, extra_files)


def read(directory: Path) -> tuple[Scheme, Checkpoint]:
    """The scheme and, lazily, the weights of a checkpoint directory; the inverse of :func:`write`.

    Raises:
        RequestError: no checkpoint of this format is there, or it was written with act-order.
    """
    quantization = read_config(directory).get("quantization_config") or {}
    if quantization.get("quant_method") != "gptq" or quantization.get("desc_act"):
        raise RequestError(f"A GPTQ checkpoint without act-order is read here, got another in {directory}.")
    version = quantization.get("checkpoint_format", "gptq")
    size = quantization["group_size"]
    grid = Grid(quantization["bits"], None if size == -1 else size, quantization["sym"])
    return Scheme(grid), Checkpoint(StoredTensors(directory), _PARTS, partial(decompress, grid=grid, version=version))
