"""The closed-form start: activations and weights of a site come into proportion."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, relative_error
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import SiteShape
from aq_lightning.quantizers import quantize_tokens
from aq_lightning.scheme import Grid
from aq_lightning.transforms import Kronecker, geometric_mean

CHANNELS = SiteShape(1, 24)


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometric_mean, "_DAMPING", 0.0)


def positive(size: int) -> Tensor:
    """Random, symmetric and positive definite."""
    root = torch.randn(size, 3 * size, dtype=torch.float64)
    return root @ root.mT / size


def same_up_to_scale(name: str, expected: Tensor, found: Tensor) -> None:
    assert_close(name, expected / expected.trace(), found / found.trace(), 1e-10)


def test_the_mean_solves_its_equation(undamped: None) -> None:
    weights, read = positive(6), positive(6)
    mean = geometric_mean.geometric_mean(weights, read)
    same_up_to_scale("G X G", weights, mean @ read @ mean)
    assert float(torch.linalg.det(mean)) == pytest.approx(1)
    root = geometric_mean.inverse_root(mean)
    assert_close("G^-½ G G^-½", torch.eye(6, dtype=torch.float64), root @ mean @ root, 1e-12)


@pytest.mark.parametrize("start", ["identity", "random"])
@pytest.mark.parametrize("form", ["free", "ldu"])
def test_balanced_moments_are_proportional(undamped: None, form: str, start: str) -> None:
    """Of moments that are Kronecker products themselves, exactly; the start's rotation stays in front."""
    read, weights = (torch.kron(positive(4), positive(6)) for _ in range(2))
    factor = Kronecker(CHANNELS, form, start, balance=True)
    both = factor(torch.float64)
    there = [both.inverse(both.inverse(read).mT), both.transpose(both.transpose(weights).mT)]  # as consumers meet them
    factor.balance(*there)
    both = factor(torch.float64)
    found = both.inverse(both.inverse(read).mT).detach()
    same_up_to_scale("moments", both.transpose(both.transpose(weights).mT).detach(), found)
    assert relative_error(read / read.trace(), weights / weights.trace()) > 0.1


def test_moments_of_rank_one_are_no_obstacle() -> None:
    """A channel that is always 0, and fewer tokens than channels."""
    x = torch.randn(2, 24, dtype=torch.float64)
    x[:, :6] = 0
    factor = Kronecker(CHANNELS, balance=True)
    factor.balance(x.mT @ x, torch.zeros(24, 24, dtype=torch.float64))
    assert float(factor.condition()) < 1e4


@torch.no_grad()
def test_a_balanced_start_rounds_better() -> None:
    """A layer with heavy channels on both sides, 4 bits on both: much less error than from a start at random."""
    heavy = torch.kron(torch.logspace(-1, 1, 4).double(), torch.logspace(0.5, -0.5, 6).double())
    x = torch.randn(400, 24, dtype=torch.float64) * heavy
    weight = torch.randn(32, 24, dtype=torch.float64) / heavy.roll(7)
    errors = {}
    for balanced in (False, True):
        factor = Kronecker(CHANNELS, balance=balanced)
        both = factor(torch.float64)
        if balanced:
            seen, rows = both.inverse(x), both.transpose(weight)
            factor.balance(seen.mT @ seen / len(x), rows.mT @ rows)
            both = factor(torch.float64)
        rounded = [quantize_tokens(each, Grid(4, symmetric=True)) for each in (both.inverse(x), both.transpose(weight))]
        errors[balanced] = relative_error(x @ weight.mT, rounded[0] @ rounded[1].mT)
    assert errors[True] < 0.7 * errors[False]


def test_orthogonal_forms_are_not_stretched() -> None:
    for form in ("orthogonal", "svd", "fixed"):
        with pytest.raises(RequestError, match=f"not orthogonal, got form '{form}'"):
            Kronecker(CHANNELS, form, balance=True)
