"""Rounders choose codes on the grid that they are given: as the papers' algorithms do, and better than the nearest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import MinMax
from aq_lightning.rounders import GPTQ, CoordinateDescent, Moments, Nearest
from aq_lightning.scheme import Grid

OUT, IN = 12, 48
GRIDS = [Grid(3), Grid(4, 16), Grid(2, 8, True), Grid(4, None, True)]


def layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (out, in), what the full-precision model feeds it and what the quantized one does, (tokens, in)."""
    generator = torch.Generator().manual_seed(seed)
    normal = {"dtype": torch.float64, "generator": generator}
    full = torch.randn(200, IN, **normal) @ torch.randn(IN, IN, **normal) / IN**0.5
    full *= torch.linspace(3, 0.3, IN)[torch.randperm(IN, generator=generator)]
    return torch.randn(OUT, IN, **normal), full, full + 0.3 * full.roll(1, 1) + 0.1 * torch.randn(200, IN, **normal)


def moments(full: Tensor, read: Tensor) -> Moments:
    return Moments(read.T @ read / len(read), (full - read).T @ read / len(read))


def nearest(grid: Grid, weight: Tensor) -> QTensor:
    return MinMax(grid, tuple(weight.shape), torch.float16).quantize(weight)


def error(weight: Tensor, codes: QTensor, x: Tensor) -> float:
    return float(((weight - codes.dequantize(torch.float64)) @ x.T).square().mean())


def slow_gptq(weight: Tensor, start: QTensor, hessian: Tensor, act_order: bool) -> Tensor:
    """Codes by the paper's eq. 2 and 3 as they stand: after each column the inverse of what remains of H is computed
    anew, without Cholesky factors, blocks or permuted copies."""
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    size = weight.shape[1] // start.scale.shape[1]
    order = (-hessian.diagonal()).argsort(stable=True).tolist() if act_order else list(range(len(hessian)))
    weight, codes, top = weight.clone(), torch.zeros_like(start.codes), 2**start.grid.bits - 1
    for position, column in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        for row in range(weight.shape[0]):
            scale, zero = float(start.scale[row, column // size]), int(start.zero[row, column // size])
            code = min(max(round(float(weight[row, column]) / scale) + zero, 0), top)
            codes[row, column] = code
            off = weight[row, column] - (code - zero) * scale
            weight[row, left] -= off / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_is_the_papers_algorithm(grid: Grid, act_order: bool) -> None:
    weight, full, read = layer()
    seen, start = moments(full, read), nearest(grid, weight)
    found = GPTQ(act_order=act_order, block=7).round(weight, start, seen)
    assert torch.equal(found.codes, slow_gptq(weight, start, seen.second, act_order))
    assert found.scale is start.scale and found.zero is start.zero and found.codes.dtype == torch.uint8


GOLDEN = load_file(Path(__file__).with_name("llmcompressor.safetensors"))


@pytest.mark.parametrize("name", sorted(GOLDEN.keys() - {"weight", "second"}))
def test_gptqs_codes_are_llm_compressors(name: str) -> None:
    """Of version 0.14 on the same grid, from benchmarks/golden_gptq.py: bits, group size, symmetry and act-order."""
    bits, size, symmetric, act_order = name.split()
    grid = Grid(int(bits), None if size == "None" else int(size), symmetric == "True")
    weight = GOLDEN["weight"].double()
    start = MinMax(grid, tuple(weight.shape), torch.float32).quantize(weight)
    found = GPTQ(act_order=act_order == "True").round(weight, start, Moments(GOLDEN["second"].double()))
    assert torch.equal(found.codes, GOLDEN[name])
    assert (found.codes != start.codes).double().mean() > 0.25, "not the nearest"


def slow_gptaq(weight: Tensor, start: QTensor, seen: Moments, asymmetry: float) -> Tensor:
    """Codes column by column; those that remain take in, by least squares, both what rounding the column lost and what
    the column's input differs by: from H and D of the remaining columns, inverted anew each time."""
    hessian = seen.second + 0.01 * seen.second.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    size = IN // start.scale.shape[1]
    weight, codes = weight.clone(), torch.zeros_like(start.codes)
    for j in range(IN):
        scale, zero = start.scale[:, j // size].double(), start.zero[:, j // size].double()
        codes[:, j] = ((weight[:, j] / scale).round() + zero).clamp(0, 2**start.grid.bits - 1)
        w, rounded = weight[:, j].clone(), (codes[:, j] - zero) * scale
        rest = slice(j + 1, IN)
        solve = torch.linalg.inv(hessian[rest, rest])
        weight[:, rest] += torch.outer(w - rounded, hessian[j, rest] @ solve)
        weight[:, rest] += asymmetry * torch.outer(w, seen.asymmetry[j, rest] @ solve)
    return codes


@pytest.mark.parametrize("asymmetry", [0.25, 1.0])
def test_gptaq_is_the_papers_algorithm(asymmetry: float) -> None:
    weight, full, read = layer()
    seen, start = moments(full, read), nearest(Grid(3, 16), weight)
    for block in (1, 7, IN):
        found = GPTQ(act_order=False, block=block, asymmetry=asymmetry).round(weight, start, seen)
        assert torch.equal(found.codes, slow_gptaq(weight, start, seen, asymmetry)), f"blocks of {block}"


def test_asymmetry_needs_something_to_compare() -> None:
    weight, full, read = layer()
    start, seen = nearest(Grid(3), weight), moments(full, read)
    plain = GPTQ().round(weight, start, seen)
    for same in (replace(seen, asymmetry=None), replace(seen, asymmetry=0 * seen.second)):
        assert torch.equal(GPTQ(asymmetry=1.0).round(weight, start, same).codes, plain.codes)
    assert not torch.equal(GPTQ(asymmetry=1.0).round(weight, start, seen).codes, plain.codes)


@pytest.mark.parametrize("seed", range(3))
def test_asymmetry_comes_nearer_to_the_full_precision_output(seed: int) -> None:
    weight, full, read = layer(seed)
    seen, start = moments(full, read), nearest(Grid(4), weight)

    def off(rounder: GPTQ) -> float:
        rounded = rounder.round(weight, start, seen).dequantize(torch.float64)
        return float((full @ weight.T - read @ rounded.T).square().mean())

    assert off(GPTQ(asymmetry=1.0)) < 0.9 * off(GPTQ())


@pytest.mark.parametrize(
    "rounder", [GPTQ(), GPTQ(act_order=False), CoordinateDescent()], ids=["order", "no order", "CD"]
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_nearest_codes_are_kept_where_inputs_are_uncorrelated(grid: Grid, rounder) -> None:
    weight = layer()[0]
    start = nearest(grid, weight)
    assert torch.equal(rounder.round(weight, start, Moments(torch.eye(IN, dtype=torch.float64))).codes, start.codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_rounder_is_better_than_the_one_before(grid: Grid) -> None:
    weight, full, read = layer()
    start, seen = nearest(grid, weight), moments(read, read)
    steps = [Nearest(), GPTQ(act_order=False), CoordinateDescent(GPTQ())]
    losses = [error(weight, rounder.round(weight, start, seen), read) for rounder in steps]
    assert losses[1] < 0.8 * losses[0] and losses[2] < losses[1]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_coordinate_descent_never_raises_the_error_and_ends(grid: Grid) -> None:
    weight, _, read = layer()
    start, seen = nearest(grid, weight), moments(read, read)
    losses = [error(weight, start, read)]
    for sweeps in (1, 2, 4, 50, 51):
        found = CoordinateDescent(sweeps=sweeps, damping=0.0).round(weight, start, seen)
        losses.append(error(weight, found, read))
    assert all(after <= before * (1 + 1e-12) for before, after in zip(losses, losses[1:], strict=False))
    assert losses[1] < 0.8 * losses[0] and losses[-1] == losses[-2]
    again = CoordinateDescent(damping=0.0).round(weight, found, seen)
    assert torch.equal(again.codes, found.codes), "a fixed point stays"


@pytest.mark.parametrize("rounder", [GPTQ(), CoordinateDescent()], ids=["GPTQ", "CD"])
def test_channels_that_are_always_zero_keep_their_nearest_codes(rounder) -> None:
    weight, full, read = layer()
    read = read.clone()
    read[:, [3, 20]] = 0
    start = nearest(Grid(3, 16), weight)
    found = rounder.round(weight, start, moments(read, read))
    assert torch.equal(found.codes[:, [3, 20]], start.codes[:, [3, 20]])
    nothing = rounder.round(weight, start, moments(0 * read, 0 * read))
    assert torch.equal(nothing.codes, start.codes), "an expert that no token reaches"


def test_damping_is_a_part_of_the_mean_diagonal() -> None:
    second = torch.diag(torch.tensor([4.0, 0.0, 2.0], dtype=torch.float64))
    expected = torch.diag(torch.tensor([19.0, 10.0, 13.0], dtype=torch.float64) / 3)
    assert_close("H", expected, Moments(second).damped(1.0), 1e-12)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: GPTQ(damping=0.0), "above 0.*got 0.0"),
        (lambda: GPTQ(block=0), "1 column or more, got 0"),
        (lambda: GPTQ(asymmetry=2.0), "lies in .0, 1., got 2.0"),
        (lambda: CoordinateDescent(sweeps=0), "1 sweep or more.*got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make()
