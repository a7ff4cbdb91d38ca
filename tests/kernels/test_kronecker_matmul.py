"""A Kronecker product ahead of a product with a packed weight: the operator, and the kernel against the plain path."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from quantized import DEVICE, HALVES, fresh_memory_is_nan, operands, random_weight
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.kernels.int4_int8_matmul import int4_int8_matmul, rounding
from aq_lightning.kernels.int4_int8_matmul import triton as product
from aq_lightning.kernels.int4_matmul.config import Config
from aq_lightning.kernels.kronecker_matmul import LARGEST, Kronecker, kronecker_matmul, naive, size
from aq_lightning.kernels.packed import Operands

CPU = torch.device("cpu")
SIDES = [(16, 16), (8, 64), (6, 16), (5, 48), (1, 32), (64, 64)]
"""With and without padding of either side, and powers of two or not, which decides how integers are stored."""


def kronecker(sides: tuple[int, int], dtype: torch.dtype, clip: bool, whole: bool = False, device=DEVICE) -> Kronecker:
    """Random matrices and clips; ``whole``: such that all sums of small integers are exact."""
    left, right = (torch.randn(n, n) / n**0.5 for n in sides)
    ends = torch.rand(2) * 0.5 + 0.5
    if whole:
        left, right, ends = left.sign(), torch.eye(sides[1]).roll(3, 0), torch.tensor([0.5, 0.75])
    matrices = left.to(device, dtype), right.to(device, dtype)
    return Kronecker(*matrices, ends.to(device, dtype) if clip else None)


def quantize(x: Tensor, by: Kronecker, bits: int, weight: Operands, config: Config) -> tuple[Tensor, Tensor]:
    """The kernel's answer, its scales written over NaN."""
    from aq_lightning.kernels.kronecker_matmul import triton

    with fresh_memory_is_nan():
        return triton.quantize(x, by, bits, weight, product.width_of(x.shape[1], weight, config))


def channels(sides: tuple[int, int]) -> int:
    return sides[0] * sides[1]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("clip", [False, True])
def test_whole_numbers_become_the_same_integers(sides: tuple[int, int], clip: bool) -> None:
    """In the same order, with zeros behind the last channel: as those of the plain product, rounded by its kernel."""
    turn = SIDES.index(sides) + clip
    bits, activation_bits, dtype = (4, 2)[turn % 2], (4, 8)[turn // 2 % 2], HALVES[turn // 4 % len(HALVES)]
    weight = operands(random_weight(64, channels(sides), bits, None, False))
    x = torch.randint(-3, 4, (5, channels(sides)), device=DEVICE).to(dtype)
    x[1] = 0
    by = kronecker(sides, dtype, clip, whole=True)
    for config in (Config(), Config(unroll=2)):
        width = product.width_of(x.shape[1], weight, config)
        codes, scale = rounding.quantize(naive.transformed(x, by), activation_bits, weight, width)
        found = quantize(x, by, activation_bits, weight, config)
        assert codes.any() and torch.equal(found[1], scale) and torch.equal(found[0], codes)


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_the_kernel_equals_the_plain_path(sides: tuple[int, int]) -> None:
    """Up to sums in another order: a number on an edge of half precision or of the grid falls on either side."""
    turn = SIDES.index(sides)
    dtype = HALVES[turn % len(HALVES)]
    weight = operands(random_weight(70, channels(sides), 4, None, False, dtype))
    x = torch.randn(7, channels(sides), device=DEVICE).to(dtype)
    by = kronecker(sides, dtype, turn % 3 > 0)
    codes, scale = quantize(x, by, 8, weight, Config())
    expected, steps = rounding.quantize(naive.transformed(x, by), 8, weight, codes.shape[1])
    assert_close("scales", steps, scale, torch.finfo(dtype).eps)
    distance = (codes.int() - expected.int()).abs()
    assert distance.max() <= (1 if dtype == torch.float16 else 2) and (distance > 0).float().mean() < 0.05
    y = product.multiply(codes, scale, weight, None, Config(32, 8), x)
    assert_close("y", int4_int8_matmul(naive.transformed(x, by), *weight, 8), y, 1e-2)


def test_programs_walk_over_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from aq_lightning.kernels.kronecker_matmul import triton

    weight, x = operands(random_weight(64, 128, 4, None, False)), torch.randn(11, 128, device=DEVICE).half()
    by = kronecker((8, 16), torch.float16, True)
    codes, scale = quantize(x, by, 4, weight, Config())
    monkeypatch.setattr(triton, "_PROGRAMS", 3)
    again = quantize(x, by, 4, weight, Config())
    assert torch.equal(again[0], codes) and torch.equal(again[1], scale)
    assert quantize(x[:0], by, 4, weight, Config())[0].shape == (0, 128)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("clip", [False, True])
def test_what_is_not_finite_stays_so_in_its_token(clip: bool) -> None:
    weight, x = operands(random_weight(64, 256, 4, None, False)), torch.randn(4, 256, device=DEVICE).half()
    x[1, 7], x[2, 200] = float("nan"), float("inf")
    by = kronecker((16, 16), torch.float16, clip)
    codes, scale = quantize(x, by, 8, weight, Config())
    y = product.multiply(codes, scale, weight, None, Config(32, 8), x)
    assert y.isfinite().all(1).tolist() == [True, False, False, True] and not y[1:3].isfinite().any()


def test_the_operator_is_the_product_of_the_plain_paths() -> None:
    weight = Operands(*(t.cpu() for t in operands(random_weight(70, 96, 4, None, False))[:2]), 4)
    x, bias = torch.randn(2, 3, 96), torch.randn(70)
    by = kronecker((6, 16), torch.float32, True, device=CPU)
    dense = torch.kron(by.left, by.right)
    assert_close("product", x @ dense, naive.transformed(x, by._replace(clip=None)), 1e-5)
    expected = int4_int8_matmul(naive.transformed(x, by), *weight, 4, bias)
    assert torch.equal(kronecker_matmul(x, by, weight, 4, bias), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_sees_one_operator() -> None:
    weight = Operands(*(t.cpu() for t in operands(random_weight(20, 96, 4, None, False))[:2]), 4)
    by = kronecker((6, 16), torch.float16, True, device=CPU)
    arguments = (torch.randn(3, 96).half(), *weight, torch.randn(20), *by, 4)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.aq_lightning.kronecker_matmul, arguments, test_utils=tests)


REFUSALS = {
    r"n₁ n₂ = 96 channels, got \(6, 6\) and \(8, 8\)": {"right": torch.zeros(8, 8).half()},
    r"n₁ n₂ = 96 channels, got \(6, 5\) and \(16, 16\)": {"left": torch.zeros(6, 5).half()},
    "right has the dtype and device of the activations, torch.float16 on cpu, got torch.float32": {
        "right": torch.zeros(16, 16)
    },
    "clip has the dtype and device of .* got torch.float64": {"clip": torch.ones(2).double()},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message: str) -> None:
    weight = Operands(*(t.cpu() for t in operands(random_weight(20, 96, 4, None, False))[:2]), 4)
    by = kronecker((6, 16), torch.float16, True, device=CPU)._replace(**REFUSALS[message])
    with pytest.raises(RequestError, match=message):
        kronecker_matmul(torch.zeros(2, 96).half(), by, weight, 4)


@pytest.mark.parametrize("sides", [(64, 64), (86, 128), (112, 128), (64, 80), (64, 128)])
def test_sizes_of_large_models_fit_a_program(sides: tuple[int, int]) -> None:
    assert size(Kronecker(torch.empty(sides[0], 1), torch.empty(sides[1], 1))) <= LARGEST


@pytest.mark.skipif(DEVICE == "cpu", reason="the plain path answers on the CPU")
@pytest.mark.parametrize(("sides", "bits"), [((64, 64), 4), ((86, 128), 4), ((16, 40), 3), ((128, 144), 4)])
def test_every_way_on_a_gpu(sides: tuple[int, int], bits: int) -> None:
    """By the kernel, or past it where widths or sizes do not fit."""
    weight = operands(random_weight(70, channels(sides), bits, None, False))
    x, by = torch.randn(3, 2, channels(sides), device=DEVICE).half(), kronecker(sides, torch.float16, True)
    y, expected = kronecker_matmul(x, by, weight, 8), int4_int8_matmul(naive.transformed(x, by), *weight, 8)
    assert_close("y", expected, y, 1e-2)
    assert torch.equal(kronecker_matmul(x, by, weight, 8), y)


def test_division_by_a_kept_inverse_is_exact() -> None:
    """The formula of :func:`steps_in` with fused multiply–adds, for all sizes of tokens and numbers near their ties."""
    most = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()[:, None]  # all of float16
    for half in (1.5, 7.5, 31.5):
        s = most / torch.full_like(most, half)
        ties = (torch.arange(int(half) + 1) + 0.5) * s  # (sizes, ties)
        x = torch.cat([ties.half().float(), (ties * (1 + 2**-11)).half().float(), most], 1).clamp(max=65504)
        inverse = 1 / s
        q = x * inverse
        rest = (x.double() - q.double() * s.double()).float()
        found = (q.double() + rest.double() * inverse.double()).float()
        assert torch.equal(found, x / s)
