"""Searched ranges: never worse than the whole range in the error that is searched, and each error is what it says."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.quantizers import GridSearch, LearnedClipping, LearnedRounding, MinMax, SearchedRange
from aq_lightning.quantizers.search import _AT_ONCE
from aq_lightning.scheme import Grid

GRIDS = [Grid(3), Grid(2, 16), Grid(2, 8, True), Grid(4, None, True)]
SEARCHES = [GridSearch(), GridSearch(power=2.4), GridSearch("diagonal"), GridSearch("full")]


def layer() -> tuple[Tensor, Tensor]:
    """A weight (6, 32) with an outlier, and the second moments of correlated inputs (32, 32)."""
    x = torch.randn(100, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64)
    weight = torch.randn(6, 32, dtype=torch.float64)
    weight[0, 0] = 9.0
    return weight, x.T @ x / 100


def error(search: GridSearch, off: Tensor, second: Tensor, groups: int) -> Tensor:
    """What each group of ``off`` (out, in) adds up to, written as loops."""
    size = off.shape[1] // groups
    result = torch.zeros(off.shape[0], groups, dtype=off.dtype)
    for row in range(off.shape[0]):
        for group in range(groups):
            part = slice(group * size, (group + 1) * size)
            own, moments = off[row, part], second[part, part]
            if search.weighting == "full":
                result[row, group] = own @ moments @ own
            else:
                weights = moments.diagonal() if search.weighting == "diagonal" else 1.0
                result[row, group] = (own.abs() ** search.power * weights).sum()
    return result


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: f"{s.weighting}-{s.power}")
def test_no_candidate_is_better(grid: Grid, search: GridSearch) -> None:
    weight, second = layer()
    quantizer = SearchedRange(grid, (6, 32), torch.float16, search)
    quantizer.initialize(weight, [second])
    found = error(search, quantizer(weight) - weight, second, grid.groups(32))
    whole = error(search, MinMax(grid, (6, 32), torch.float16)(weight) - weight, second, grid.groups(32))
    assert bool((found <= whole * (1 + 1e-12)).all()) and float(found.sum()) < 0.97 * float(whole.sum())
    for part in torch.linspace(1, 0.2, 81).tolist():
        quantizer.start(*2 * [torch.full(quantizer.low.shape, part)])
        other = error(search, quantizer(weight) - weight, second, grid.groups(32))
        assert bool((found <= other * (1 + 1e-6)).all()), f"both ends at {part}"


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: f"{s.weighting}-{s.power}")
def test_candidates_side_by_side_are_those_one_by_one(
    grid: Grid, search: GridSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, second = layer()
    groups = weight.view(6, grid.groups(32), -1)
    alone = search(groups, second, grid, torch.float16)
    for together in (7, 81, 1000):
        monkeypatch.setitem(_AT_ONCE, "cpu", together * groups.numel())
        assert all(map(torch.equal, search(groups, second, grid, torch.float16), alone))


@pytest.mark.parametrize("together", [1, 81])
def test_scales_that_storage_cannot_hold_are_passed_over(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 bits up to 6e5 either side: 171429, where float16 ends at 65504."""
    groups = torch.linspace(-6e5, 6e5, 64).view(1, 1, 64)
    monkeypatch.setitem(_AT_ONCE, "cpu", 64 * together)
    low, high = GridSearch()(groups, None, Grid(3, 64), torch.float16)
    assert 0.2 <= float(low) < 0.5 and 0.2 <= float(high) < 0.5


def test_both_ends_are_nearly_the_best_of_all_pairs() -> None:
    """Searched one after the other, against every pair of ends, with an outlier on one side."""
    weight = torch.randn(8, 32, dtype=torch.float64)
    weight[:, 0] = 5.0
    quantizer = SearchedRange(Grid(3), (8, 32), torch.float32)
    quantizer.initialize(weight, [])

    def errors() -> Tensor:
        return (quantizer(weight) - weight).square().sum(1)

    found, least = errors(), torch.full((8,), torch.inf, dtype=torch.float64)
    together = least.clone()
    for low, high in product(torch.linspace(1, 0.2, 41).tolist(), repeat=2):
        quantizer.start(torch.full((8, 1), low), torch.full((8, 1), high))
        least = torch.minimum(least, errors())
        together = torch.minimum(together, errors()) if low == high else together
    assert found.sum() < 1.001 * least.sum() and found.sum() < 0.9995 * together.sum()


def test_stacked_weights_are_searched_each_with_its_own_moments() -> None:
    weight, second = layer()
    shifted = second.flip(0, 1)
    search, grid = GridSearch("diagonal"), Grid(2, 8)
    both = SearchedRange(grid, (12, 32), torch.float16, search)
    both.initialize(torch.stack([weight, -weight]), [second, shifted])
    for half, part, moments in ((slice(0, 6), weight, second), (slice(6, 12), -weight, shifted)):
        one = SearchedRange(grid, (6, 32), torch.float16, search)
        one.initialize(part, [moments])
        assert torch.equal(both.low[half], one.low) and torch.equal(both.high[half], one.high)


@pytest.mark.parametrize("kind", [LearnedClipping, LearnedRounding])
def test_learned_ranges_start_where_the_search_ends(kind: type) -> None:
    weight, _ = layer()
    searched = SearchedRange(Grid(2, 8), (6, 32), torch.float16)
    searched.initialize(weight, [])
    learnt = kind(Grid(2, 8), (6, 32), torch.float16, search=GridSearch())
    learnt.initialize(weight, [])
    for expected, actual in zip(searched.fractions(), learnt.fractions(), strict=True):
        widest = 1.0 if kind is LearnedRounding else torch.tensor(4.0).sigmoid()
        assert_close("fraction", expected.clamp(max=widest), actual, 1e-6)
    plain = kind(Grid(2, 8), (6, 32), torch.float16)
    before = [each.clone() for each in plain.fractions()]
    plain.initialize(weight, [])
    assert all(map(torch.equal, before, plain.fractions())), "nothing is searched unless asked"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"weighting": "full", "power": 2.4}, "squared, got power 2.4"),
        ({"steps": 0}, "got 0 steps to 0.2"),
        ({"least": 1.0}, "got 80 steps to 1.0"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(arguments: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        GridSearch(**arguments)
