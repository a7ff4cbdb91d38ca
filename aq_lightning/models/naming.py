"""Names of a model's tensors in checkpoints, where they differ from those of its modules.

Experts are stacked in parameters of a block, while checkpoints (the published ones, and what serving engines read) keep
each expert's linears apart. Both functions read the same data of the architecture and leave all other tensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Architecture
from aq_lightning.qtensor import QTensor

Value = TypeVar("Value", bound=QTensor | Tensor)


def to_checkpoint(
    tensors: Mapping[str, QTensor | Tensor], architecture: Architecture, block: nn.Module
) -> dict[str, QTensor | Tensor]:
    """A block's tensors under the names of checkpoints; the inverse of :func:`from_checkpoint`.

    Args:
        tensors: by their names in the block; those of experts (experts, out, in), or quantized (experts · out, in).
        architecture: says which are stacked, and where they go.
        block: the block, whose parameters say how many experts there are.
    """
    result: dict[str, QTensor | Tensor] = {}
    for name, tensor in tensors.items():
        if name not in architecture.experts:
            result[renamed(name, architecture)] = tensor
            continue
        paths = [
            f"{path.replace('*', str(expert))}.weight"
            for expert in range(len(block.get_parameter(name)))
            for path in architecture.experts[name]
        ]
        parts = tensor.split(len(paths)) if isinstance(tensor, QTensor) else tensor.flatten(0, 1).chunk(len(paths))
        result |= zip(paths, parts, strict=True)
    return result


def from_checkpoint(tensors: Mapping[str, Value], architecture: Architecture) -> dict[str, Value]:
    """Tensors under the names of the modules; the inverse of :func:`to_checkpoint`, for names from any root.

    Raises:
        RequestError: a linear of some expert is missing.
    """
    result: dict[str, Value] = {}
    parts: dict[str, dict[tuple[int, int], Value]] = {}
    for name, tensor in tensors.items():
        place = _place(name, architecture)
        if place is None:
            result[_back(name, architecture)] = tensor
        else:
            parts.setdefault(place[0], {})[place[1:]] = tensor
    for parameter, found in parts.items():
        experts, each = (1 + max(key[axis] for key in found) for axis in (0, 1))
        if len(found) != experts * each:
            raise RequestError(
                f"A checkpoint holds every linear of every expert, got {len(found)} of {experts * each} for "
                f"{parameter}: write it again."
            )
        rows = [found[key] for key in sorted(found)]
        joined = QTensor.joined(rows) if isinstance(rows[0], QTensor) else torch.cat(rows).unflatten(0, (experts, -1))
        result[parameter] = joined
    return result


def in_modules(name: str, architecture: Architecture) -> str:
    """The module's or parameter's name of one tensor in a checkpoint, from any root; many experts' have one."""
    place = _place(name, architecture)
    return _back(name, architecture) if place is None else place[0]


def renamed(name: str, architecture: Architecture) -> str:
    """The name in checkpoints of a tensor or module that is no expert's, from any root."""
    for module, path in architecture.stored.items():
        name = re.sub(rf"(^|\.){re.escape(module)}(?=\.|$)", rf"\g<1>{path}", name)
    return name


def _back(name: str, architecture: Architecture) -> str:
    """The inverse of :func:`renamed`."""
    for module, path in architecture.stored.items():
        name = re.sub(rf"(^|\.){re.escape(path)}(?=\.|$)", rf"\g<1>{module}", name)
    return name


def _place(name: str, architecture: Architecture) -> tuple[str, int, int] | None:
    """Parameter, expert and part of an expert's linear; None: the tensor is something else."""
    for parameter, paths in architecture.experts.items():
        for part, path in enumerate(paths):
            pattern = re.escape(path).replace(r"\*", r"(\d+)")
            match = re.fullmatch(rf"(|.*\.){pattern}\.weight", name)
            if match:
                return match[1] + parameter, int(match[2]), part
    return None
