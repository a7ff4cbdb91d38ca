"""The AWQ format, version ``gemm``, as AutoAWQ wrote it: vLLM, SGLang and transformers (with GPTQModel) load it.

A weight ``<linear>.weight`` of shape (N, K) with 4-bit codes in G groups becomes

====================  ==================  ==============================================================================
``<linear>.qweight``  int32 (K, N / 8)    codes, packed along N: nibble i (from the least significant) of word w is
                                          output ``8 w + (0, 2, 4, 6, 1, 3, 5, 7)[i]``
``<linear>.qzeros``   int32 (G, N / 8)    zero points, packed likewise
``<linear>.scales``   16 bits (G, N)      w = (u − z) s
====================  ==================  ==============================================================================

Zero points are stored as they are, also those of symmetric grids (8). Other tensors are stored as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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

_FORM = "awq"
_BITS = 4
_PARTS = (".qweight", ".qzeros", ".scales")
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # output of each nibble among the 8 of a word


def check(subject: Subject) -> None:
    """
    Raises:
        RequestError: activations, bits, dtype or shapes that the format cannot hold.
    """
    check_weights_only(subject, _FORM)
    check_bits(subject, (_BITS,), _FORM)
    check_sixteen_bits(subject, _FORM)
    check_word_shapes(subject, _FORM, inputs=1, outputs=8)


def compress(name: str, tensor: QTensor) -> dict[str, Tensor]:
    """The stored tensors of a weight; the inverse of :func:`decompress`."""
    linear = stem(name, _FORM)
    return {
        f"{linear}.qweight": _interleave(tensor.codes.T),
        f"{linear}.qzeros": _interleave(tensor.zero.T),
        f"{linear}.scales": tensor.scale.T.contiguous(),
    }


def decompress(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QTensor:
    """The weight in its stored tensors; the inverse of :func:`compress`."""
    qweight, qzeros, scales = (tensors[stem(name, _FORM) + part] for part in _PARTS)
    return QTensor(_restore(qweight), scales.T.contiguous(), _restore(qzeros), grid)


def pack(weights: Weights, scheme: Scheme) -> dict[str, Tensor]:
    """Stored tensors of quantized and other weights together."""
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        stored |= compress(name, value) if isinstance(value, QTensor) else {name: value}
    return stored


def write(
    out: Path,
    source_config: Mapping[str, Any],
    shards: Iterable[Weights],
    scheme: Scheme,
    *,
    ignore: Sequence[str] = ("lm_head",),
    extra_files: Iterable[Path] = (),
) -> None:
    """Writes a checkpoint directory atomically; the inverse of :func:`read`.

    Args:
        out: directory to make; may exist if empty.
        source_config: ``config.json`` of the model.
        shards: tensors of one file each, packed or not, consumed lazily.
        scheme: integers of every quantized weight.
        ignore: module paths of the linears in full precision.
        extra_files: tokenizer and the like, to be copied.
    """
    quantization = {
        "quant_method": "awq",
        "bits": scheme.weight.bits,
        "group_size": scheme.weight.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(ignore),
    }
    config = {**source_config, "quantization_config": quantization}
    write_directory(out, config, (pack(shard, scheme) for shard in shards), {}, extra_files)


def read(directory: Path) -> tuple[Scheme, Checkpoint]:
    """The scheme and, lazily, the weights of a checkpoint directory; the inverse of :func:`write`.

    The format does not say whether a grid is symmetric: all are read as asymmetric, with the same numbers.

    Raises:
        RequestError: no checkpoint of this format is there.
    """
    quantization = read_config(directory).get("quantization_config") or {}
    if (quantization.get("quant_method"), quantization.get("version")) != ("awq", "gemm"):
        raise RequestError(f"An AWQ checkpoint of version gemm is read here, got another in {directory}.")
    size = quantization["group_size"]
    grid = Grid(quantization["bits"], None if size == -1 else size)
    return Scheme(grid), Checkpoint(StoredTensors(directory), _PARTS, partial(decompress, grid=grid))


def _interleave(codes: Tensor) -> Tensor:
    """uint8 (rows, N) → int32 (rows, N / 8)."""
    return pack_words(codes.unflatten(1, (-1, 8))[..., _ORDER].flatten(1), _BITS, "dense")


def _restore(packed: Tensor) -> Tensor:
    """int32 (rows, N / 8) → uint8 (N, rows)."""
    nibbles = unpack_words(packed, _BITS, 8 * packed.shape[1], "dense").unflatten(1, (-1, 8))
    return nibbles[..., _ORDER.argsort()].flatten(1).T.contiguous()
