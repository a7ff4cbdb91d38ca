"""The operator on the CPU, what torch.compile sees of it, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from quantized import random_weight

from aq_lightning.errors import RequestError
from aq_lightning.kernels.int4_matmul import int4_matmul, naive
from aq_lightning.kernels.packed import PackedWeight, expect

SIZES = [(1, 16, None), (70, 96, 32), (64, 128, 64), (5, 384, 128), (33, 80, 16), (65, 300, None)]


def arguments(packed: PackedWeight) -> tuple:
    return packed.words, packed.scales, packed.grid.bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "size"), SIZES, ids=str)
def test_the_plain_path_is_the_product_with_the_dequantized_weight(bits, symmetric, rows, columns, size) -> None:
    weight = random_weight(rows, columns, bits, size, symmetric)
    x, bias = torch.randn(2, 3, columns), torch.randn(rows)
    packed = PackedWeight.pack(weight)
    assert torch.equal(naive.dequantize(*arguments(packed), columns), weight.dequantize(torch.float32))
    expected = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    assert_close("float32", expected, int4_matmul(x, *arguments(packed), bias), 1e-6)
    half = int4_matmul(x.half(), *arguments(packed))
    assert half.dtype == torch.float16 and half.shape == (2, 3, rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("symmetric", [False, True])
def test_torch_sees_one_operator(symmetric: bool) -> None:
    packed = PackedWeight.pack(random_weight(20, 64, 4, 32, symmetric))
    x = torch.randn(3, 64, dtype=torch.float16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.aq_lightning.int4_matmul, (x, *arguments(packed), torch.randn(20)), test_utils=tests
    )
    torch.library.opcheck(torch.ops.aq_lightning.int4_matmul, (x, *arguments(packed)), test_utils=tests)


REFUSALS = {
    "Activations on cpu are float16 or bfloat16 or float32, got torch.float64": {"x": torch.zeros(2, 64).double()},
    r"words are those of PackedWeight.pack, contiguous, got torch.int32": {"words": torch.zeros(1, 1, 1, 64, 32).int()},
    r"2 groups and 4 bits for 96 channels has words .* check the activations' last size": {"x": torch.zeros(2, 96)},
    r"2 groups and 3 bits .* has words \(1, 1, 3, 64, 32\), got \(1, 1, 1, 64, 32\)": {"bits": 3},
    r"bias has shape \(20,\), got \(19,\)": {"bias": torch.zeros(19)},
    r"bias is contiguous, got strides \(2,\)": {"bias": torch.zeros(40)[::2]},
    r"scales are those of PackedWeight.pack, contiguous, got torch.float32": {"scales": torch.zeros(2, 20)},
    r"bias are on meta, activations on cpu": {"bias": torch.zeros(20, device="meta")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message: str) -> None:
    packed = PackedWeight.pack(random_weight(20, 64, 4, 32, False))
    given = dict(zip(("words", "scales", "bits"), arguments(packed), strict=True), x=torch.zeros(2, 64))
    with pytest.raises(RequestError, match=message):
        expect(**({"bias": None} | given | REFUSALS[message]))


def test_the_operator_refuses() -> None:
    packed = PackedWeight.pack(random_weight(20, 64, 4, 32, False))
    with pytest.raises(RequestError, match="check the activations' last size"):
        int4_matmul(torch.zeros(2, 96), *arguments(packed))
