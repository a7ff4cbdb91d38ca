"""Random quantized weights for the tests of kernels, and memory that shows what was not written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from aq_lightning.kernels.packed import Operands, PackedWeight
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter truncates to bfloat16")
)


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


def operands(weight: QTensor) -> Operands:
    """The weight as the kernels get it, on the GPU if there is one."""
    packed = PackedWeight.pack(weight)
    return Operands(packed.words.to(DEVICE), packed.scales.to(DEVICE), weight.grid.bits)


@contextmanager
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
