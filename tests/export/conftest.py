"""Weights and models to export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aq_lightning.qtensor import QTensor, encode, grid_of
from aq_lightning.scheme import Grid


@pytest.fixture(scope="session")
def minmax() -> Callable[[Tensor, Grid, torch.dtype], QTensor]:
    """Plain min-max quantization of a weight, its scales stored in a dtype."""

    def quantize(weight: Tensor, grid: Grid, storage: torch.dtype) -> QTensor:
        groups = weight.unflatten(1, (grid.groups(weight.shape[1]), -1))  # (out, groups, size)
        scale, zero = grid_of(groups.amin(-1), groups.amax(-1), grid, storage)
        codes = encode(groups, scale[..., None], zero[..., None], grid).flatten(1)
        return QTensor(codes.to(torch.uint8), scale.to(storage), zero.to(torch.uint8), grid)

    return quantize
