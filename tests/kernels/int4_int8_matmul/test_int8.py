"""Quantized activations times packed weights: the operator, and the kernels against the plain path."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from quantized import DEVICE, HALVES, fresh_memory_is_nan, operands, random_weight
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.kernels.int4_int8_matmul import int4_int8_matmul, naive
from aq_lightning.kernels.int4_matmul.config import Config
from aq_lightning.kernels.packed import Operands
from aq_lightning.quantizers.activations import quantize_tokens
from aq_lightning.scheme import Grid

ROUNDING = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of results


@pytest.fixture
def answer():
    """The kernels' answer, written over NaN: (x, weight, bits, bias, config) → y."""

    def run(x: Tensor, weight: Operands, bits: int, bias: Tensor | None, config: Config) -> Tensor:
        from aq_lightning.kernels.int4_int8_matmul import triton

        with fresh_memory_is_nan():
            return triton.int4_int8_matmul(x, weight, bits, bias, config)

    return run


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_activations_are_rounded_as_in_training(bits: int) -> None:
    x = torch.randn(5, 96)
    x[1], x[2, 0] = 0.0, 50.0
    assert torch.equal(naive.fake_quantize(x, bits), quantize_tokens(x, Grid(bits, symmetric=True)))
    assert torch.equal(naive.fake_quantize(x.half(), bits), quantize_tokens(x.half(), Grid(bits, symmetric=True)))


@pytest.mark.parametrize("size", [32, None])
def test_the_plain_path_is_the_product_of_rounded_activations(size: int | None) -> None:
    weight = random_weight(70, 96, 4, size, False)
    x, bias = torch.randn(2, 3, 96), torch.randn(70)
    rounded = quantize_tokens(x, Grid(8, symmetric=True))
    expected = torch.nn.functional.linear(rounded.double(), weight.dequantize(torch.float64), bias.double())
    packed = Operands(*(t.cpu() for t in operands(weight)[:2]), 4)
    assert_close("y", expected, int4_int8_matmul(x, *packed, 8, bias), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_sees_one_operator() -> None:
    packed = Operands(*(t.cpu() for t in operands(random_weight(20, 64, 4, 32, False))[:2]), 4)
    tests = ("test_schema", "test_faketensor")
    arguments = (torch.randn(3, 64).half(), *packed, 8, torch.randn(20))
    torch.library.opcheck(torch.ops.aq_lightning.int4_int8_matmul, arguments, test_utils=tests)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_widths_of_activations_are_checked(bits: int) -> None:
    packed = Operands(*(t.cpu() for t in operands(random_weight(20, 64, 4, 32, False))[:2]), 4)
    with pytest.raises(RequestError, match=f"have 2 to 8 bits here, got {bits}"):
        int4_int8_matmul(torch.zeros(1, 64), *packed, bits)


GROUPS = [(300, None), (768, 256), (512, 128), (192, 64), (96, 32), (80, 16)]  # columns, and those of a group


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("columns", "size"), GROUPS)
def test_the_kernel_equals_the_plain_path(bits, columns, size, answer) -> None:
    """Both widths of weights for all groups; those of activations, and dtypes, take turns."""
    turn = GROUPS.index((columns, size))
    activation_bits, dtype = (4, 8)[(turn + bits // 4) % 2], HALVES[turn // 2 % len(HALVES)]
    weight = random_weight(70, columns, bits, size, False, dtype)
    x, bias = torch.randn(5, columns, device=DEVICE).to(dtype), torch.randn(70, device=DEVICE).to(dtype)
    packed = operands(weight)
    expected = naive.int4_int8_matmul(x.float(), *packed, activation_bits, bias)
    for config in (
        Config(32, 8),
        Config(64, 16, splits=2),
        Config(16, 8, unroll=2, warps=1),
        Config(32, 8, joined=True),
        Config(32, 8, warps=2, divided=True),
        Config(16, 16, stages=3, warps=4, divided=True),
    ):
        assert_close(str(config), expected, answer(x, packed, activation_bits, bias, config), ROUNDING[dtype])


WIDTHS = [(60, 2), (256, 4), (320, 2), (1300, 4), (4096, 4), (9216, 2)]
"""Columns, and bits of the weight: of one warp and of several, in one step and in more, with and without padding."""


@pytest.mark.parametrize(("columns", "weight_bits"), WIDTHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_become_the_same_integers(columns: int, weight_bits: int, bits: int) -> None:
    from aq_lightning.kernels.int4_int8_matmul import rounding, triton

    weight = operands(random_weight(64, columns, weight_bits, None if columns % 32 else 32, False))
    x = torch.randn(60 if columns < 300 else 6, columns, device=DEVICE).half()  # each with a number on a rounding tie
    x[1], x[2, 3] = 0.0, 60000.0
    with fresh_memory_is_nan():
        codes, scale = rounding.quantize(x, bits, weight, triton.width_of(columns, weight, Config(unroll=2)))
    expected, steps = naive.quantize(x, bits)
    assert torch.equal(scale[:, None], steps)
    assert torch.equal(codes, in_order(expected, weight, codes.shape[1]))


def in_order(codes: Tensor, weight: Operands, width: int) -> Tensor:
    """Integers in the order of the weight's bytes, zeros behind the last: byte ``2 c + h`` of code j is column
    ``chunk · (h · per + j) + c`` of its tile."""
    padded = torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
    tiles = padded.unflatten(1, (-1, 2, 8 // weight.bits, weight.words.shape[4]))  # (M, tiles, h, j, c)
    return tiles.permute(0, 1, 3, 4, 2).flatten(1)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter
def test_what_is_not_finite_stays_so_in_its_token(answer) -> None:
    weight, x = operands(random_weight(70, 512, 4, 128, False)), torch.randn(5, 512, device=DEVICE).half()
    x[1, 7], x[2, 500], x[3, 64] = float("nan"), float("inf"), float("-inf")
    y = answer(x, weight, 8, None, Config(32, 8))
    assert y.isfinite().all(1).tolist() == [True, False, False, False, True] and not y[1:4].isfinite().any()


def test_the_same_bits_every_time(answer) -> None:
    packed = operands(random_weight(70, 768, 4, 128, False))
    x = torch.randn(5, 768, device=DEVICE).half()
    first = answer(x, packed, 8, None, Config(32, 8, splits=3))
    for _ in range(3):
        assert torch.equal(answer(x, packed, 8, None, Config(32, 8, splits=3)), first)


def test_zero_points_at_both_ends_are_exact(answer) -> None:
    weight = random_weight(64, 256, 4, None, False)
    weight.codes[:32], weight.zero[:32] = 15, 0
    weight.codes[32:], weight.zero[32:] = 0, 15
    weight.scale.fill_(1.0)
    x = torch.full((2, 256), 0.5, device=DEVICE).half()
    y = answer(x, operands(weight), 8, None, Config(64, 8))
    expected = 15 * 256 * 0.5 * torch.cat([torch.ones(32), -torch.ones(32)]).to(y)
    assert_close("sums", expected.expand_as(y).float(), y.float(), 1e-3 + 1 / 255)


@pytest.mark.skipif(DEVICE == "cpu", reason="the plain path answers on the CPU")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_on_a_gpu(bits: int) -> None:
    packed = operands(random_weight(70, 256, bits, 128, False))
    x = torch.randn(3, 2, 256, device=DEVICE).half()
    y, expected = int4_int8_matmul(x, *packed, 8), naive.int4_int8_matmul(x.float(), *packed, 8)
    assert_close("y", expected, y, 2e-3)


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() < (9, 0), reason="programmatic dependent launch, since Hopper"
)
@pytest.mark.parametrize("size", [128, None])
@pytest.mark.parametrize("cut", [{"splits": 2, "warps": 2}, {"divided": True}], ids=str)
def test_products_that_start_early_wait_for_what_they_read(size: int | None, cut: dict) -> None:
    from aq_lightning.kernels.int4_int8_matmul import triton

    weight = random_weight(1024, 1024, 4, size, True)
    weight.scale.mul_(0.25)  # the chain neither grows nor fades
    packed = operands(weight)
    x = torch.randn(3, 1024, device=DEVICE).half()

    def chain(config: Config) -> Tensor:
        y = x
        for _ in range(12):
            y = triton.int4_int8_matmul(y, packed, 8, None, config)
        return y

    expected = chain(Config(32, 8, **cut))
    assert expected.isfinite().all() and expected.abs().max() > 0
    for _ in range(20):
        assert torch.equal(chain(Config(32, 8, **cut, overlap=True)), expected)
