"""The quantized model as an ordinary one: ``weight = (u − z) s``, computed in the dtype of the scales.

Any client loads it, and computes in half precision what those of packed formats do. It is as large as the original.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.export.base import Subject, Weights, check_weights_only
from aq_lightning.export.directory import StoredTensors, read_config, write_directory
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Scheme


def check(subject: Subject) -> None:
    """
    Raises:
        RequestError: activations are quantized, which an ordinary model does not do.
    """
    check_weights_only(subject, "dense")


def pack(weights: Weights, scheme: Scheme) -> dict[str, Tensor]:
    """All weights as ordinary tensors."""
    return {
        name: value.dequantize(value.scale.dtype) if isinstance(value, QTensor) else value
        for name, value in weights.items()
    }


def write(
    out: Path,
    source_config: Mapping[str, Any],
    shards: Iterable[Weights],
    scheme: Scheme,
    *,
    ignore: Sequence[str] = (),
    extra_files: Iterable[Path] = (),
) -> None:
    """Writes a model directory atomically.

    Args:
        out: directory to make; may exist if empty.
        source_config: ``config.json`` of the model.
        shards: tensors of one file each, quantized or not, consumed lazily.
        scheme: not stored.
        ignore: not stored.
        extra_files: tokenizer and the like, to be copied.
    """
    config = {name: value for name, value in source_config.items() if name != "quantization_config"}
    write_directory(out, config, (pack(shard, scheme) for shard in shards), {}, extra_files)


def read(directory: Path) -> tuple[None, StoredTensors]:
    """No scheme, and lazily the weights of a model directory.

    Raises:
        RequestError: there is none, or it is quantized.
    """
    if "quantization_config" in read_config(directory):
        raise RequestError(f"A dense model has no quantization_config, got one in {directory}: name its format.")
    return None, StoredTensors(directory)
