"""Random quantized weights for the tests of kernels."""

from __future__ import annotations

import torch

from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid


def random_weight(
    rows: int, columns: int, bits: int, size: int | None, symmetric: bool, storage: torch.dtype = torch.float16
) -> QTensor:
    """Random codes, with zero points at both ends among them unless symmetric."""
    grid = Grid(bits, size, symmetric)
    groups = grid.groups(columns)
    scale = (torch.rand(rows, groups) + 0.5).mul(0.02).to(storage)
    zero = torch.full((rows, groups), grid.levels // 2, dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(grid.levels, (rows, groups), dtype=torch.uint8)
        zero.view(-1)[0], zero.view(-1)[-1] = 0, grid.levels - 1
    return QTensor(torch.randint(grid.levels, (rows, columns), dtype=torch.uint8), scale, zero, grid)
