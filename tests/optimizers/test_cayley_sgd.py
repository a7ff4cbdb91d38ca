"""Steps over orthogonal matrices stay there, and go down."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.optimizers import CayleySGD
from aq_lightning.optimizers.cayley_sgd import turned


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_a_hundred_steps_stay_orthogonal(size: float) -> None:
    rotation = orthogonal(3, 24, 24)
    start = rotation.clone()
    for _ in range(100):
        rotation = turned(rotation, size * torch.randn_like(rotation), 1.5)
    unit = torch.eye(24, dtype=torch.float64).expand_as(rotation)
    assert_close("R Rᵀ", unit, rotation @ rotation.mT, 1e-12)
    assert (rotation - start).norm() > 1e-3


def test_a_small_step_follows_the_gradient_along_the_manifold() -> None:
    """To first order R moves by −η Y R, with Y the skew part of G Rᵀ."""
    rotation, gradient, rate = orthogonal(8, 8), torch.randn(8, 8, dtype=torch.float64), 1e-7
    outer = gradient @ rotation.mT
    expected = -(outer - outer.mT) / 2 @ rotation
    assert_close("direction", expected, (turned(rotation, gradient, rate) - rotation) / rate, 1e-6)


def test_large_gradients_do_not_make_large_steps() -> None:
    """A step turns by no angle beyond 2 atan(½)."""
    rotation = orthogonal(8, 8)
    moved = turned(rotation, 1e9 * torch.randn(8, 8, dtype=torch.float64), 1.5) @ rotation.mT
    angles = torch.linalg.eigvals(moved).angle().abs()
    assert angles.max() <= 2 * torch.tensor(0.5).atan() + 1e-9


def test_it_finds_a_rotation() -> None:
    """Procrustes' problem: X R = Y."""
    x, goal = torch.randn(64, 6, dtype=torch.float64), orthogonal(6, 6)
    goal = goal * goal.det().sign()  # what can be reached continuously from the unit
    goal[0] *= goal.det().sign()
    rotation = nn.Parameter(torch.eye(6, dtype=torch.float64))
    optimizer = CayleySGD([rotation, nn.Parameter(torch.empty(0, 4, 4))], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x @ rotation - x @ goal).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(300)]
    assert losses[-1] < 1e-6 * losses[0]


def test_a_matrix_without_a_gradient_stays() -> None:
    rotation = nn.Parameter(orthogonal(4, 4))
    before = rotation.detach().clone()
    CayleySGD([rotation]).step()
    assert torch.equal(rotation, before)


def test_refused_step_size() -> None:
    with pytest.raises(RequestError, match="got -1"):
        CayleySGD([nn.Parameter(torch.eye(2))], lr=-1)
