"""Learned rounding starts as round-to-nearest, reaches both neighbours of every weight, and finds better ones."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.optimizers import SignSGD
from aq_lightning.quantizers import LearnedRounding, MinMax
from aq_lightning.scheme import Grid

GRIDS = [Grid(3), Grid(4, 16), Grid(2, 8, True), Grid(8, None, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_starts_as_round_to_nearest(grid: Grid) -> None:
    weight = torch.randn(6, 32, dtype=torch.float64)
    nearest = MinMax(grid, (6, 32), torch.float16).quantize(weight)
    started = LearnedRounding(grid, (6, 32), torch.float16).quantize(weight)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(started, name), getattr(nearest, name))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("up", [True, False])
def test_half_a_step_reaches_the_other_neighbour(grid: Grid, up: bool) -> None:
    weight = torch.randn(6, 32, dtype=torch.float64)
    quantizer = LearnedRounding(grid, (6, 32), torch.float16)
    quantizer.offset.data.fill_(0.4999 if up else -0.4999)
    found = quantizer.quantize(weight)
    scale, zero = (x.double().repeat_interleave(32 // found.scale.shape[1], 1) for x in (found.scale, found.zero))
    steps = weight / scale
    aside = (steps - steps.round()).abs() > 2e-4  # not on the grid already
    expected = ((steps.ceil() if up else steps.floor()) + zero).clamp(0, grid.levels - 1)
    assert torch.equal(found.codes[aside].double(), expected[aside]) and aside.double().mean() > 0.99


def test_gradient_is_the_outputs_times_the_scale() -> None:
    """Straight through the rounding, 0 where the code is clamped."""
    weight = torch.tensor([[-4.0, -3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 5.0]], dtype=torch.float64)
    quantizer = LearnedRounding(Grid(2), (1, 8), torch.float32)
    quantizer.lower.data.fill_(0.5), quantizer.upper.data.fill_(0.5)
    scale = 1.5  # from −2 to 2.5
    upstream = torch.arange(1.0, 9.0, dtype=torch.float64)
    (quantizer(weight) * upstream).sum().backward()
    zero = round(2 / scale)
    free = torch.tensor([0 <= round(float(w) / scale) + zero <= 3 for w in weight[0]])
    assert quantizer.offset.grad[0].tolist() == pytest.approx((upstream * scale * free).tolist(), rel=1e-6)
    assert free.any() and not free.all()


@pytest.mark.parametrize("reach", [0.25, 1.0, 2.0])
def test_reach_bounds_how_far_a_code_goes(reach: float) -> None:
    weight, grid = torch.linspace(-1, 1, 64, dtype=torch.float64).view(1, 64), Grid(4)
    quantizer = LearnedRounding(grid, (1, 64), torch.float32, reach=reach)
    start = quantizer.quantize(weight).codes.int()
    quantizer.offset.data.fill_(9.0)
    quantizer.project()
    moved = (quantizer.quantize(weight).codes.int() - start)[start < grid.levels - 3]
    assert moved.max() == max(1, int(reach)) and moved.min() == int(reach)
    with pytest.raises(RequestError, match="got reach 0"):
        LearnedRounding(grid, (1, 64), torch.float32, reach=0.0)


def test_projection_keeps_the_bounds() -> None:
    quantizer = LearnedRounding(Grid(3), (2, 8), torch.float32)
    for parameter in quantizer.parameters():
        parameter.data.copy_(torch.linspace(-3, 3, parameter.numel()).view_as(parameter))
    quantizer.project()
    assert quantizer.offset.min() == -0.5 and quantizer.offset.max() == 0.5
    assert [quantizer.lower.min(), quantizer.upper.max()] == [0.0, 1.0]


def layer_loss(weight: Tensor, rounded: Tensor, x: Tensor) -> Tensor:
    return (x @ (weight - rounded).T).square().mean()


def trained(quantizer: LearnedRounding, weight: Tensor, x: Tensor, steps: int = 200) -> float:
    """Loss of the best step of sign descent on a layer's output, as the paper's."""
    optimizer = SignSGD(quantizer.parameters(), lr=1 / steps)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    best = float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = layer_loss(weight, quantizer(weight), x)
        best = min(best, float(loss.detach()))
        loss.backward()
        optimizer.step()
        schedule.step()
        quantizer.project()
    return best


@pytest.mark.parametrize("seed", [0, 4, 10])
def test_the_best_of_all_roundings(seed: int) -> None:
    """Of 2⁸ roundings of one row on a fixed grid with correlated inputs, where nearest is far from the best.

    Sign descent does not find it for every row; for these it does.
    """
    torch.manual_seed(seed)
    x = torch.randn(64, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    weight, grid = torch.randn(1, 8, dtype=torch.float64), Grid(3)
    nearest = MinMax(grid, (1, 8), torch.float32)
    stored = nearest.quantize(weight)
    floor = (weight / stored.scale.double()).floor()
    every = torch.tensor(list(product([0, 1], repeat=8)), dtype=torch.float64)  # (256, 8)
    codes = (floor + every + stored.zero.double()).clamp(0, grid.levels - 1)
    losses = ((codes - stored.zero.double()) * stored.scale.double() - weight) @ x.T
    least = float(losses.square().mean(1).min())
    quantizer = LearnedRounding(grid, (1, 8), torch.float32)
    quantizer.lower.requires_grad_(False), quantizer.upper.requires_grad_(False)
    assert float(layer_loss(weight, nearest(weight), x)) > 1.5 * least
    assert trained(quantizer, weight, x) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("bits, ratio", [(2, 0.7), (3, 0.85), (4, 0.85)])
def test_training_lowers_the_error_of_a_layer(bits: int, ratio: float) -> None:
    x = torch.randn(256, 64, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64)
    weight = torch.randn(16, 64, dtype=torch.float64)
    nearest = float(layer_loss(weight, MinMax(Grid(bits), (16, 64), torch.float16)(weight), x))
    quantizer = LearnedRounding(Grid(bits), (16, 64), torch.float16)
    assert trained(quantizer, weight, x) < ratio * nearest
