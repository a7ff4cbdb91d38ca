"""Random quantized weights for the tests of kernels, and memory that shows what was not written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aq_lightning.kernels.packed import Operands, PackedWeight
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
"""What kernels read, without bfloat16 in Triton's interpreter, which truncates to it. In sweeps they take turns: each
case is one more kernel to compile."""


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
def fresh_memory_is_nan() -> Iterator[None]:
    """What a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills torch.empty
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Deterministic behavior was enabled")  # of cuBLAS
            yield
    finally:
        torch.use_deterministic_algorithms(False)
