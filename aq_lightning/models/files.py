"""What a model directory claims, checked against its files before anything is built from it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aq_lightning.errors import RequestError

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_GREATEST = 2**40  # of an integer in a configuration


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        RequestError: it does not.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path.name} is a readable JSON file, got {str(path)!r} ({error}): write or download it "
                           "again.") from error  # fmt: skip
    if not isinstance(content, dict):
        raise RequestError(f"{path.name} holds a JSON object, got {str(path)!r} with {type(content).__name__}: write "
                           "or download it again.")  # fmt: skip
    return content


def weight_map(index: Path) -> dict[str, Path]:
    """Tensor → file, of an index of shards, all of which lie beside it.

    Raises:
        RequestError: it names anything else.
    """
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise RequestError(f"An index has a weight_map, got none in {str(index)!r}: download it again.")
    for file in {str(file) for file in names.values()}:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise RequestError(f"An index names safetensors files beside it, got {file!r} in {str(index)!r}: do not "
                               "use this model.")  # fmt: skip
        if not (index.parent / file).is_file():
            raise RequestError(f"All shards of a model are there, got {str(index)!r} without {file!r}: download it "
                               "again.")  # fmt: skip
    return {name: index.parent / str(file) for name, file in names.items()}


def check_model_files(directory: Path) -> None:
    """Checks every index, the header of every safetensors file, and the sizes that ``config.json`` claims.

    No claim costs memory or time: a header may not be longer than its file, nor a model have more layers than tensors.

    Raises:
        RequestError: a file is missing, truncated, damaged or claims the impossible.
    """
    for index in sorted(directory.glob("*.safetensors.index.json")):
        weight_map(index)
    tensors = {name for file in sorted(directory.glob("*.safetensors")) for name in _names(file)}
    config = directory / "config.json"
    if config.is_file():
        _check_sizes(read_object(config), tensors, config)


def stored_numbers(directory: Path) -> int:
    """Elements of all tensors in a directory's safetensors files, by their headers."""
    count = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in _names(file))
    return count


def check_numbers(model: nn.Module, held: int, location: str) -> None:
    """Checks before memory is taken that a configuration does not describe more numbers than the files hold.

    Args:
        model: skeleton of what it describes.
        held: elements of the stored tensors.
        location: of the files.

    Raises:
        RequestError: it does.
    """
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > held:
        raise RequestError(
            f"config.json describes the weights beside it, got {described:,} parameters for {held:,} stored numbers in "
            f"{location!r}: mend config.json, or download the model again."
        )


def check_finite(tensors: Mapping[str, Tensor], location: str) -> None:
    """Checks weights that were read.

    Raises:
        RequestError: one is NaN or infinite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RequestError(
                f"A model's weights are finite, got NaN or infinity in {name} of {location!r}: download it again, or "
                "mend that tensor."
            )


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise RequestError(
            f"A safetensors file has a whole header and all its tensors, got {str(file)!r} ({error}): download it "
            "again."
        ) from error


def _check_sizes(config: dict[str, Any], tensors: Collection[str], path: Path) -> None:
    for part in (config, config.get("text_config")):
        for name, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, int) and abs(value) > _GREATEST:
                raise RequestError(f"Sizes are sensible numbers, got {name} {value:.0e} in {str(path)!r}: mend it.")
            if name in _LAYERS and not (isinstance(value, int) and 0 < value <= len(tensors)):
                raise RequestError(f"A model has a tensor or more to a layer, got {name} {value!r:.40} and "
                                   f"{len(tensors)} tensors in {str(path.parent)!r}: mend config.json.")  # fmt: skip
