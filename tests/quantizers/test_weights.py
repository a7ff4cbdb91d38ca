"""Learned clipping starts as round-to-nearest, and its gradient finds better ranges."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.quantizers import LearnedClipping, LearnedRounding, MinMax, quantized_activations
from aq_lightning.scheme import Grid

GRIDS = [Grid(3), Grid(4, 16), Grid(2, 8, True), Grid(8, None, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_wide_open_clipping_is_min_max(grid: Grid) -> None:
    weight = torch.randn(6, 32, dtype=torch.float64)
    shape = (6, 32)
    reference = MinMax(grid, shape, torch.float16).quantize(weight)
    opened = LearnedClipping(grid, shape, torch.float16, start=40.0).quantize(weight)
    assert torch.equal(opened.codes, reference.codes) and torch.equal(opened.scale, reference.scale)
    started = LearnedClipping(grid, shape, torch.float16).quantize(weight)
    assert_close("scale", reference.scale * torch.tensor(4.0).sigmoid(), started.scale, 1e-3)
    assert not torch.equal(started.scale, reference.scale)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradient_reaches_the_clipping(grid: Grid) -> None:
    quantizer = LearnedClipping(grid, (6, 32), torch.float16, start=1.0)
    weight = torch.randn(6, 32, dtype=torch.float64)
    (quantizer(weight) - weight).square().sum().backward()
    reached = (quantizer.lower.grad != 0) | (quantizer.upper.grad != 0)
    assert bool(reached.all()), "every group"
    if not grid.symmetric:
        assert bool((quantizer.lower.grad != 0).all()) and bool((quantizer.upper.grad != 0).all())


def test_gradient_passes_the_zero_point() -> None:
    """Straight through its rounding: a value clamped at the top is (levels − 1 − z) s, which depends on z."""
    quantizer = LearnedClipping(Grid(2), (1, 8), torch.float32, start=0.0)
    weight = torch.tensor([[-4.0, -3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 6.0]], dtype=torch.float64)
    quantizer(weight)[0, -1].backward()
    # s = (h − l) / 3 and, straight through, dz/dh = d(−l / s)/dh = l / (3 s²), hence by the product rule:
    low, high = -2.0, 3.0  # σ(0) of −4 and 6
    scale = (high - low) / 3
    zero = round(-low / scale)
    expected = (3 - zero) / 3 - scale * low / (3 * scale**2)
    assert quantizer.upper.grad.item() == pytest.approx(expected * 6.0 * 0.25, rel=1e-5)


@pytest.mark.parametrize("bits, ratio", [(2, 0.8), (3, 0.99), (4, 0.99)])
def test_training_the_clipping_lowers_the_error(bits: int, ratio: float) -> None:
    weight = torch.randn(16, 64, dtype=torch.float64)
    weight[:, 3] *= 4
    quantizer = LearnedClipping(Grid(bits), (16, 64), torch.float16)
    nearest = (MinMax(Grid(bits), (16, 64), torch.float16)(weight) - weight).square().mean()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        error = (quantizer(weight) - weight).square().mean()
        error.backward()
        optimizer.step()
    assert error < ratio * nearest


def test_group_that_does_not_divide_is_refused() -> None:
    for kind in (MinMax, LearnedClipping, LearnedRounding):
        with pytest.raises(RequestError, match="divide the 32 input channels.*got 24"):
            kind(Grid(4, 24), (6, 32), torch.float16)


def test_activations_are_quantized_only_while_asked() -> None:
    linear, x = nn.Linear(8, 4), torch.randn(3, 8)
    plain = linear(x)
    with quantized_activations([nn.Sequential(linear)], Grid(3, symmetric=True)):
        assert not torch.equal(linear(x), plain)
    assert torch.equal(linear(x), plain)
    with quantized_activations([linear], None):
        assert torch.equal(linear(x), plain)


def hostile(groups: tuple[int, int, int], kind: str) -> Tensor:
    """Weights (out, groups, size) with a group of a kind that divides by its own range if it can."""
    weight = torch.randn(groups, dtype=torch.float64)
    weight[0, 0] = {
        "zero": torch.zeros(groups[2], dtype=torch.float64),
        "constant": torch.full((groups[2],), 0.7, dtype=torch.float64),
        "negative constant": torch.full((groups[2],), -0.7, dtype=torch.float64),
        "tiny": 1e-30 * weight[0, 0],
        "small": 1e-6 * weight[0, 0],
        "outlier": weight[0, 0] + 1e3 * (torch.arange(groups[2]) == 0),
        "ordinary": weight[0, 0],
    }[kind]
    return weight


@settings(max_examples=150, deadline=None)
@given(
    groups=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9)),
    name=st.sampled_from(["zero", "constant", "negative constant", "tiny", "small", "outlier", "ordinary"]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    storage=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 9),
)
def test_any_group_is_rounded_to_its_own_grid(groups, name, bits, symmetric, storage, seed) -> None:
    """One number for training and file, all of them finite, every weight within a step of where it was."""
    torch.manual_seed(seed)
    grid, shape = Grid(bits, groups[2], symmetric), (groups[0], groups[1] * groups[2])
    weight = hostile(groups, name)
    reach = torch.maximum(weight.amax(-1), -weight.amin(-1))  # (out, groups)
    width = 2 * reach if symmetric else weight.amax(-1).clamp(min=0) - weight.amin(-1).clamp(max=0)
    for kind in (MinMax, LearnedClipping, LearnedRounding):
        quantizer = kind(grid, shape, storage)
        if quantizer.offset is not None:
            quantizer.offset.data.uniform_(-0.5, 0.5)
        flat = weight.flatten(1).requires_grad_()
        rounded, stored = quantizer(flat), quantizer.quantize(flat)
        assert_close("stored", rounded, stored.dequantize(torch.float64), 1e-15)
        assert int(stored.codes.max()) < grid.levels and int(stored.zero.max()) < grid.levels
        assert bool((stored.scale > 0).all()) and bool(stored.scale.isfinite().all())
        rounded.square().sum().backward()
        assert bool(flat.grad.isfinite().all())
        assert all(bool(parameter.grad.isfinite().all()) for parameter in quantizer.parameters())
        if isinstance(quantizer, MinMax):
            scale = stored.scale.double()
            coarse = grid.levels * (scale - width / (grid.levels - 1)).abs()  # what the stored scale does to the ends
            off = (rounded.detach() - weight.flatten(1)).view(groups).abs()
            assert bool((off <= (scale + coarse)[..., None] * (1 + 1e-9)).all())
        if name == "zero" and quantizer.offset is None:
            assert not rounded[0, : groups[2]].any()
