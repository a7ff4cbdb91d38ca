"""GPTQ's words, read by an unpacker that knows nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.export import formats
from aq_lightning.export.directory import read_config
from aq_lightning.export.gptq import BITS, compress, decompress, read
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid

ROWS, COLUMNS = 32, 64


def stored_bit(words: list[int], position: int) -> int:
    return words[position // 32] >> (position % 32) & 1


def number(words: list[int], index: int, bits: int) -> int:
    """The index-th number of a stream of bits that starts at the lowest bit of the first word."""
    return sum(stored_bit(words, index * bits + bit) << bit for bit in range(bits))


def slow_weight(stored: dict[str, Tensor], bits: int, added: int) -> Tensor:
    """The weight (N, K), one number after the other."""
    result = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    words, zeros = stored["a.qweight"].tolist(), stored["a.qzeros"].tolist()
    for row in range(ROWS):
        column_words = [line[row] for line in words]
        for column in range(COLUMNS):
            group = int(stored["a.g_idx"][column])
            zero = number(zeros[group], row, bits) + added
            scale = float(stored["a.scales"][group, row])
            result[row, column] = (number(column_words, column, bits) - zero) * scale
    return result


@pytest.mark.parametrize("size", [16, None])
@pytest.mark.parametrize("symmetric, version, added", [(True, "gptq", 1), (True, "gptq_v2", 0), (False, "gptq_v2", 0)])
@pytest.mark.parametrize("bits", BITS)
def test_words(
    minmax: Callable[..., QTensor], bits: int, symmetric: bool, version: str, added: int, size: int | None
) -> None:
    grid = Grid(bits, size, symmetric)
    tensor = minmax(torch.randn(ROWS, COLUMNS), grid, torch.float16)
    stored = compress("a.weight", tensor, version)
    assert torch.equal(slow_weight(stored, bits, added), tensor.dequantize(torch.float64))
    back = decompress("a.weight", stored, grid, version)
    assert all(torch.equal(getattr(back, part), getattr(tensor, part)) for part in ("codes", "scale", "zero"))
    shapes = {name: (part.dtype, tuple(part.shape)) for name, part in stored.items()}
    groups = COLUMNS // (size or COLUMNS)
    assert shapes == {
        "a.qweight": (torch.int32, (COLUMNS * bits // 32, ROWS)),
        "a.qzeros": (torch.int32, (groups, ROWS * bits // 32)),
        "a.scales": (torch.float16, (groups, ROWS)),
        "a.g_idx": (torch.int32, (COLUMNS,)),
    }


def test_version_1_stores_the_zero_point_less_one(minmax: Callable[..., QTensor]) -> None:
    tensor = minmax(torch.randn(ROWS, COLUMNS), Grid(4, 16, symmetric=True), torch.float16)
    assert set(compress("a.weight", tensor, "gptq")["a.qzeros"].flatten().tolist()) == {0x77777777}


def test_the_config_says_what_clients_ask(quantized: Callable, tmp_path: Path) -> None:
    made = quantized("llama", "w4a16g32sym")
    for name, expected in {"gptq": "gptq", "gptq_v2": "gptq_v2"}.items():
        out = made.write(formats.named(name), tmp_path / name)
        scheme, weights = read(out)
        assert scheme == made.subject.scheme and set(weights) == set(made.weights)
        config = read_config(out)["quantization_config"]
        assert config.pop("meta")["quantizer"][0].startswith("aq_lightning:")
        assert config == {
            "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
            "checkpoint_format": expected, "pack_dtype": "int32",
        }  # fmt: skip


def test_inputs_in_another_order_are_refused(minmax: Callable[..., QTensor]) -> None:
    tensor = minmax(torch.randn(ROWS, COLUMNS), Grid(4, 16), torch.float16)
    stored = compress("a.weight", tensor, "gptq_v2")
    stored["a.g_idx"] = stored["a.g_idx"].flip(0)
    with pytest.raises(RequestError, match="another g_idx in a.weight"):
        decompress("a.weight", stored, tensor.grid, "gptq_v2")
