"""The laws of the integer grid, for any range of numbers."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aq_lightning.qtensor import QTensor, decode, encode, grid_of, round_through
from aq_lightning.quantizers import MinMax, quantize_tokens
from aq_lightning.scheme import Grid

SHAPE = (3, 32)
STORAGE = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
GRIDS = st.builds(Grid, st.integers(2, 8), st.sampled_from([None, 8, 16, 32]), st.booleans())
KINDS = ("normal", "positive", "negative", "constant", "outlier")


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Float64 weights of several shapes of distribution, between 1e-3 and 1e2 in size."""
    kind, size, seed = draw(st.sampled_from(KINDS)), 10.0 ** draw(st.integers(-3, 2)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * size
    if kind == "constant":
        weight = weight[:, :1].expand(SHAPE).contiguous()
    if kind == "outlier":
        weight[:, 5] *= 50
    return {"positive": weight.abs(), "negative": -weight.abs()}.get(kind, weight)


def grouped(values: Tensor, like: QTensor) -> Tensor:
    return values.unflatten(1, (like.scale.shape[1], -1))


@given(weights(), GRIDS, STORAGE)
@settings(max_examples=150, deadline=None)
def test_laws_of_the_grid(weight: Tensor, grid: Grid, storage: torch.dtype) -> None:
    quantizer = MinMax(grid, SHAPE, storage)
    packed = quantizer.quantize(weight)
    codes, scale, zero = packed.codes, packed.scale, packed.zero
    assert codes.dtype == zero.dtype == torch.uint8 and scale.dtype == storage
    assert int(codes.max()) < grid.levels and int(zero.max()) < grid.levels
    assert bool((scale > 0).all()) and bool(scale.isfinite().all())
    assert not grid.symmetric or bool((zero == grid.levels // 2).all())
    values = packed.dequantize(torch.float64)
    assert max(len(row.unique()) for row in grouped(values, packed).flatten(0, 1)) <= grid.levels
    # Half a step; a scale that was rounded down to its storage dtype leaves the ends outside by levels × its rounding,
    # and the symmetric grid's upper half has one code less.
    step, real = scale.double()[..., None], torch.finfo(storage)
    rounding = (real.smallest_normal * real.eps / step).clamp(min=real.eps)  # relative; below the normal numbers more
    slack = grid.levels * rounding + (0.5 if grid.symmetric else 0.0) + 0.01
    assert bool(((grouped(values - weight, packed)).abs() <= (0.5 + slack) * step).all())


@given(weights(), GRIDS, STORAGE, st.sampled_from([torch.float64, torch.float32]))
@settings(max_examples=100, deadline=None)
def test_fake_quantization_is_the_stored_weight(weight: Tensor, grid: Grid, storage, dtype) -> None:
    quantizer = MinMax(grid, SHAPE, storage)
    weight = weight.to(dtype)
    assert torch.equal(quantizer(weight), quantizer.quantize(weight).dequantize(dtype))


@given(weights(), GRIDS, STORAGE)
@settings(max_examples=100, deadline=None)
def test_rounding_twice_is_rounding_once(weight: Tensor, grid: Grid, storage: torch.dtype) -> None:
    """On its own scale and zero point, a represented value keeps its code."""
    packed = MinMax(grid, SHAPE, storage).quantize(weight)
    scale, zero = packed.scale.double()[..., None], packed.zero.double()[..., None]
    again = encode(grouped(packed.dequantize(torch.float64), packed), scale, zero, grid)
    assert torch.equal(again.flatten(1).to(torch.uint8), packed.codes)


@given(weights(), st.integers(2, 8), STORAGE)
@settings(max_examples=60, deadline=None)
def test_error_inside_the_range_is_half_a_step(weight: Tensor, bits: int, storage: torch.dtype) -> None:
    grid = Grid(bits)
    scale, zero = grid_of(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), grid, storage)
    low, high = decode(torch.zeros(()), scale, zero), decode(torch.tensor(grid.levels - 1.0), scale, zero)
    inside = (weight >= low) & (weight <= high)
    error = (decode(encode(weight, scale, zero, grid), scale, zero) - weight).abs()
    assert bool((error <= scale * (0.5 + 1e-9))[inside].all())


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 1e-6, 1.0, -3.0, 6e4], ids=str)
def test_constant_groups(value: float, symmetric: bool, storage: torch.dtype) -> None:
    grid = Grid(4, symmetric=symmetric)
    weight = torch.full((2, 8), value, dtype=torch.float64)
    packed = MinMax(grid, (2, 8), storage).quantize(weight)
    assert bool((packed.scale > 0).all()) and bool(packed.scale.isfinite().all())
    error = (packed.dequantize(torch.float64) - weight).abs().max()
    assert error <= abs(value) * (0.08 if symmetric else 0.01) + float(torch.finfo(storage).smallest_normal)


@given(weights(), GRIDS, STORAGE)
@settings(max_examples=60, deadline=None)
def test_zero_is_represented_exactly(weight: Tensor, grid: Grid, storage: torch.dtype) -> None:
    weight[:, ::4] = 0
    values = MinMax(grid, SHAPE, storage).quantize(weight).dequantize(torch.float32)
    assert bool((values[:, ::4] == 0).all())


@given(weights(), GRIDS, STORAGE)
@settings(max_examples=60, deadline=None)
def test_scale_is_the_stored_number(weight: Tensor, grid: Grid, storage: torch.dtype) -> None:
    scale, zero = grid_of(weight.amin(1), weight.amax(1), grid, storage)
    assert torch.equal(scale, scale.to(storage).double()) and torch.equal(zero, zero.round())


def test_by_hand() -> None:
    grid, ends = Grid(2), (torch.tensor([-1.0]), torch.tensor([2.0]))
    scale, zero = grid_of(*ends, grid)
    assert (scale.item(), zero.item()) == (1.0, 1.0)
    x = torch.tensor([-5.0, -1.0, -0.4, 0.0, 0.6, 1.4, 2.0, 9.0])
    assert encode(x, scale, zero, grid).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    scale, zero = grid_of(*ends, Grid(2, symmetric=True))
    assert (scale.item(), zero.item()) == (pytest.approx(2 / 1.5), 2.0)


class _Divisors(TorchDispatchMode):
    """Records by what is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.div:
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_the_same_on_every_device(symmetric: bool) -> None:
    """On a GPU, torch divides by a tensor, but multiplies with the rounded inverse of a number."""
    with _Divisors() as divisors:
        scale, _ = grid_of(torch.tensor([-1.0]), torch.tensor([2.0]), Grid(4, symmetric=symmetric))
    assert divisors.found and all(isinstance(each, Tensor) and each.ndim == 1 for each in divisors.found)
    assert torch.equal(scale, torch.tensor([2 / 7.5 if symmetric else 3 / 15]))


@pytest.mark.parametrize("symmetric", [False, True])
def test_straight_through_gradient(symmetric: bool) -> None:
    """1 inside the range and 0 where the clamp holds."""
    grid = Grid(3, symmetric=symmetric)
    x = torch.tensor([-9.0, -0.7, 0.0, 0.3, 0.9, 9.0], dtype=torch.float64, requires_grad=True)
    scale, zero = grid_of(torch.tensor(-1.0).double(), torch.tensor(1.0).double(), grid)
    decode(encode(x, scale, zero, grid), scale, zero).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_round_through() -> None:
    x = torch.tensor([0.5, 1.5, -0.4], requires_grad=True)
    rounded = round_through(x)
    rounded.sum().backward()
    assert rounded.tolist() == [0.0, 2.0, 0.0] and x.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("symmetric", [False, True])
def test_stored_bits(symmetric: bool) -> None:
    packed = MinMax(Grid(3, 8, symmetric), (4, 32), torch.float16).quantize(torch.randn(4, 32))
    assert packed.stored_bits == 4 * 32 * 3 + 16 * (16 + (0 if symmetric else 3))


@given(weights(), st.integers(2, 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tokens_are_quantized_one_by_one(x: Tensor, bits: int, symmetric: bool) -> None:
    grid = Grid(bits, symmetric=symmetric)
    whole = quantize_tokens(x, grid)
    assert all(torch.equal(quantize_tokens(token, grid), row) for token, row in zip(x, whole, strict=True))
    assert max(len(row.unique()) for row in whole) <= grid.levels
    if bits == 8:
        assert_close("8 bits", x, whole, 0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_small_groups_keep_their_resolution(bits: int) -> None:
    """Only a group without range gets the floor: small weights are not coarsened to float16's smallest normal step."""
    weight = torch.linspace(-1e-3, 1e-3, 257, dtype=torch.float64)
    grid = Grid(bits)
    scale, zero = grid_of(weight.min(), weight.max(), grid, torch.float16)
    assert float(scale) == pytest.approx(2e-3 / (grid.levels - 1), rel=0.01)
    assert float((decode(encode(weight, scale, zero, grid), scale, zero) - weight).abs().max()) <= 0.51 * float(scale)
