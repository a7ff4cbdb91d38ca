"""How much disk a run takes, known before it begins."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from aq_lightning.calibration import AttachedBlock
from aq_lightning.calibration.attach import weights
from aq_lightning.errors import RequestError
from aq_lightning.recipe import Recipe

_SLACK = 2**24  # bytes: logs, metrics, headers, tokenizer


@dataclass(frozen=True)
class DiskUse:
    """Bytes at most, by what they are for."""

    result: int
    """The checkpoint: packed blocks, and the other tensors as they are."""
    blocks: int
    """Packed weights and transforms of every block."""
    inside: int
    """Checkpoints inside the block at work: one of each attempt at it, and the one being written."""
    tuning: int
    """What was tuned of all blocks, scales or packed weights, norms and biases, and the checkpoints meanwhile; 0 if
    nothing is."""
    streams: int
    """Activations entering the block at work, those being written and those before them; 0 if they are not kept."""

    @property
    def total(self) -> int:
        """All together."""
        return self.result + self.blocks + self.inside + self.tuning + self.streams + _SLACK

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(count)}" for name, count in vars(self).items() if count)
        return f"disk use: up to {_size(self.total)} ({parts})"


def disk_use(model: nn.Module, attached: AttachedBlock, blocks: int, recipe: Recipe, streams: int) -> DiskUse:
    """An upper bound, from shapes alone.

    Args:
        model: skeleton of the model.
        attached: one of its blocks with the recipe, alike for all.
        blocks: their number.
        recipe: the method.
        streams: elements of all streams that enter a block, each samples · length · hidden.
    """
    grid = recipe.scheme.weight
    shapes = [each.shape for each in weights(attached.block).values()]
    codes = sum(shape.numel() for shape in shapes)
    groups = sum(shape[:-1].numel() * grid.groups(shape[-1]) for shape in shapes)
    block = sum(parameter.numel() for parameter in attached.block.parameters())
    storage = torch.finfo(getattr(model.config, "dtype", None) or torch.float32).bits // 8  # bytes
    packed = (
        codes * (grid.bits + 1) // 8 + (storage + 1) * groups + storage * (block - codes)
    )  # at most 1 bit of 8 is left over
    learnt = 8 * sum(tensor.numel() for part in (attached.transforms, attached.quantizers)
                     for tensor in part.state_dict().values())  # fmt: skip
    outside = sum(parameter.numel() for parameter in model.parameters()) - blocks * block
    vectors = sum(parameter.numel() for parameter in attached.block.parameters() if parameter.ndim == 1)
    moving = recipe.tuning is not None and recipe.tuning.codes > 0
    tuned = blocks * (packed if moving else storage * (groups + vectors))
    tuned += blocks * (groups + vectors + codes * moving) * 2 * 12  # two checkpoints: parameters and moments, float32
    return DiskUse(
        result=blocks * packed + storage * max(outside, 0),
        blocks=blocks * (packed + learnt),
        inside=7 * recipe.plan.size * 6 * learnt,  # attempts, six at most; parameters, moments, states to return to
        tuning=0 if recipe.tuning is None else tuned,
        streams=2 * streams * recipe.streams.torch_dtype.itemsize,
    )


def beside(out: Path) -> Path | None:
    """A directory on the disk of a run in ``out``, for what is written for a moment; None: it may not be written."""
    place = next(each for each in out.absolute().parents if each.is_dir())
    return place if os.access(place, os.W_OK | os.X_OK) else None


def check_space(use: DiskUse, out: Path) -> int:
    """Free bytes where a run will be.

    Raises:
        RequestError: fewer than the run needs beside what is there already.
    """
    place = next(each for each in (out, *out.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    here = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    if free + here < use.total:
        raise RequestError(
            f"A run needs room, got {_size(free)} free for {str(out)!r} ({use}): free space, choose another --out"
            f"{', or add --keep_streams false' if use.streams else ''}."
        )
    return free


def _size(count: int) -> str:
    unit, name = next(
        each for each in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= each[0] / 10 or each[0] == 1e3
    )
    return f"{count / unit:.1f} {name}"
