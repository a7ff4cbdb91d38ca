"""The fused fake quantization against the plain one, forward and backward."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from quantized import DEVICE, HALVES
from torch import Tensor

from aq_lightning.kernels.fake_quantize import Request, eager, fake_quantize, fused, naive
from aq_lightning.scheme import Grid


def inputs(
    height: int, width: int, groups: int, dtype: torch.dtype, rows: bool, columns: bool, direction: bool, offset: bool
):
    """A random request: value, rows, columns, low, high, direction, offset, each a leaf that wants its gradient."""
    torch.manual_seed(height + width)

    def leaf(tensor: Tensor | None, there: bool = True) -> Tensor | None:
        return tensor.to(DEVICE).requires_grad_() if there else None

    return [
        leaf(torch.randn(height, width).to(dtype)),
        leaf(torch.rand(height) + 0.5, rows),
        leaf(torch.rand(width) + 0.5, columns),
        leaf(torch.rand(height, groups) * 0.4 + 0.6),
        leaf(torch.rand(height, groups) * 0.4 + 0.6),
        leaf(torch.randn(width), direction),
        leaf(torch.rand(height, width) - 0.5, offset),
    ]


def both(tensors, grid: Grid, storage: torch.dtype, rounding_only: bool, dtype: torch.dtype, quick=fused):
    """(outputs, gradients) of the plain path and of the kernel, or another, for one random cotangent."""
    results = []
    request = Request(*tensors, grid, storage, rounding_only, dtype)
    for call in (naive.fake_quantize, quick):
        rounded, gain = call(request)
        torch.manual_seed(1)
        loss = (rounded.float() * torch.randn(rounded.shape).to(DEVICE)).sum()
        loss = loss + (gain * torch.randn(gain.shape).to(DEVICE)).sum()
        wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        results.append(((rounded, gain), torch.autograd.grad(loss, wanted)))
    return results


KINDS = [(2, False), (3, True), (4, False), (4, True), (8, False)]  # bits, symmetry
SHAPES = [(5, 48, 3), (70, 64, 1), (33, 96, 1), (130, 128, 2), (18, 300, 1), (19, 1100, 1), (17, 2048, 2)]
SHAPES += [(130, 64, 8), (70, 1100, 1)]


CASES = [(turn, *shape) for shape in SHAPES for turn in range(2)]


@pytest.mark.parametrize(("turn", "height", "width", "groups"), CASES, ids=str)
def test_kernel_equals_the_plain_path(turn, height, width, groups) -> None:
    """Both ways of shifting for each shape; kinds of grids take turns, and each meets either."""
    bits, symmetric = KINDS[(turn + SHAPES.index((height, width, groups))) % len(KINDS)]
    rounding_only = bool(turn % 2)
    tensors = inputs(height, width, groups, torch.float32, True, True, True, True)
    grid = Grid(bits, width // groups, symmetric)
    (plain, wanted), (fused, got) = both(tensors, grid, torch.float16, rounding_only, torch.float32)
    for name, a, b in zip(("rounded", "gain"), plain, fused, strict=True):
        assert_close(name, a, b, 1e-5)
    for name, a, b in zip(("value", "rows", "columns", "low", "high", "direction", "offset"), wanted, got, strict=True):
        assert_close(name, a, b, 1e-4)


ABSENT = [(1, 1, 0, 0), (0, 1, 1, 0), (0, 0, 0, 0), (1, 0, 1, 1), (0, 0, 0, 1)]


@pytest.mark.parametrize(("width", "frozen"), [(64, False), (1300, True)])
@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_parts_may_be_absent_and_weights_frozen_or_in_half_precision(absent, frozen: bool, width: int) -> None:
    dtype = HALVES[ABSENT.index(absent) % len(HALVES)]
    tensors = inputs(20, width, 2, dtype, *absent)
    tensors[0].requires_grad_(not frozen)
    grid = Grid(4, width // 2)
    (plain, wanted), (fused, got) = both(tensors, grid, dtype, True, dtype)
    assert fused[0].dtype == dtype
    for a, b in zip([*plain, *wanted], [*fused, *got], strict=True):
        assert b.dtype == a.dtype
        assert_close("result", a.float(), b.float(), 1e-2 if a.dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("width", [32, 1300])
def test_groups_of_zeros_and_of_one_sign_stay_finite(width: int) -> None:
    tensors = inputs(6, width, 2, torch.float32, True, True, True, True)
    with torch.no_grad():
        tensors[0][0] = 0
        tensors[0][1] = tensors[0][1].abs()
        tensors[0][2] = -tensors[0][2].abs()
        tensors[0][3, ::2] = 1.5  # many weights at an end
    (plain, wanted), (fused, got) = both(tensors, Grid(3, width // 2), torch.float16, True, torch.float32)
    for a, b in zip([*plain, *wanted], [*fused, *got], strict=True):
        assert torch.isfinite(b).all()
        assert_close("result", a, b, 1e-4)


def test_more_equal_ends_than_small_numbers_count() -> None:
    tensors = inputs(2, 6000, 1, torch.float32, True, False, True, False)
    with torch.no_grad():
        tensors[0][0], tensors[0][1, :5000] = 0.5, -9.0
    (plain, wanted), (fused, got) = both(tensors, Grid(4, 6000), torch.float16, True, torch.float32)
    for a, b in zip([*plain, *wanted], [*fused, *got], strict=True):
        assert_close("result", a, b, 1e-4)


@pytest.mark.parametrize("bits, symmetric", [(2, False), (3, True), (4, False), (8, False)])
@pytest.mark.parametrize("rounding_only", [False, True])
@pytest.mark.parametrize("absent", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1), (0, 0, 0)])
def test_few_passes_equal_the_plain_path(bits, symmetric, rounding_only, absent) -> None:
    tensors = inputs(33, 96, 3, torch.float32, *absent, False)
    with torch.no_grad():
        tensors[0][0] = 0  # a group without range
        tensors[0][1] = tensors[0][1].abs()
        tensors[0][2] = -tensors[0][2].abs()
        tensors[0][3, ::2] = 1.5  # many weights at an end
    grid, float32 = Grid(bits, 32, symmetric), torch.float32
    (plain, wanted), (quick, got) = both(tensors, grid, torch.float16, rounding_only, float32, eager.fake_quantize)
    for name, a, b in zip(("rounded", "gain"), plain, quick, strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(wanted, got, strict=True):
        assert_close("gradient", a, b, 1e-5)


def test_training_in_float32_takes_few_passes_on_a_cpu_and_float64_the_plain_path(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(eager, "fake_quantize", lambda request: taken.append(request.dtype))
    for dtype in (torch.float32, torch.float64):
        weight, ends = torch.randn(4, 8, dtype=dtype), torch.ones(4, 2, dtype=dtype)
        fake_quantize(Request(weight, None, None, ends, ends, None, None, Grid(3, 4), torch.float16, True, dtype))
    assert taken == [torch.float32]
