"""AWQ's words, read by an unpacker that knows nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aq_lightning.export import formats
from aq_lightning.export.awq import compress, decompress, read
from aq_lightning.export.directory import read_config
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid

ROWS, COLUMNS = 24, 64
SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]
"""Bit at which each of 8 neighbouring outputs starts."""


def test_the_first_word_by_hand() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None]  # 8 outputs, 1 input
    tensor = QTensor(codes, torch.ones(8, 1, dtype=torch.float16), torch.zeros_like(codes), Grid(4))
    assert compress("a.weight", tensor)["a.qweight"].item() == 0x75316420


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(4), Grid(4, 32, symmetric=True)], ids=str)
def test_words(minmax: Callable[..., QTensor], grid: Grid) -> None:
    tensor = minmax(torch.randn(ROWS, COLUMNS), grid, torch.float16)
    stored = compress("a.weight", tensor)
    slow = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    size = grid.group_size or COLUMNS
    for row in range(ROWS):
        for column in range(COLUMNS):
            group = column // size
            code = int(stored["a.qweight"][column, row // 8]) >> SHIFTS[row % 8] & 15
            zero = int(stored["a.qzeros"][group, row // 8]) >> SHIFTS[row % 8] & 15
            slow[row, column] = (code - zero) * float(stored["a.scales"][group, row])
    assert torch.equal(slow, tensor.dequantize(torch.float64))
    back = decompress("a.weight", stored, grid)
    assert all(torch.equal(getattr(back, part), getattr(tensor, part)) for part in ("codes", "scale", "zero"))


def test_the_config_says_what_clients_ask(quantized: Callable, tmp_path: Path) -> None:
    made = quantized("llama", "w4a16g32")
    out = made.write(formats.named("awq"), tmp_path / "awq")
    scheme, weights = read(out)
    assert scheme == made.subject.scheme and set(weights) == set(made.weights)
    assert read_config(out)["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
