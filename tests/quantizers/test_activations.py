"""Rounded activations: what their ranges send back, compiled or not."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from aq_lightning.qtensor import ends
from aq_lightning.quantizers import quantize_tokens
from aq_lightning.scheme import Grid
from aq_lightning.transforms.online import clipped

GRID = Grid(4, symmetric=True)


def test_ends_are_the_extremes_and_so_are_their_gradients() -> None:
    x = torch.randn(3, 5, 16, requires_grad=True)
    low, high = ends(x)
    assert torch.equal(low, x.amin(-1, keepdim=True)) and torch.equal(high, x.amax(-1, keepdim=True))
    (2 * low + 3 * high).sum().backward()
    expected = torch.zeros_like(x).scatter(-1, x.argmin(-1, keepdim=True), 2).scatter(-1, x.argmax(-1, keepdim=True), 3)
    assert torch.equal(x.grad, expected)


def test_ends_of_equals_and_of_no_gradient() -> None:
    x = torch.tensor([[1.0, 1.0, 0.0, 0.0]], requires_grad=True)
    low, high = ends(x)
    (low + 2 * high).sum().backward()
    assert x.grad.tolist() == [[2.0, 0.0, 1.0, 0.0]]
    assert [float(each) for each in ends(x.detach())] == [0.0, 1.0]


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
@pytest.mark.parametrize("cut", [False, True])
def test_compiled_under_autocast_the_gradient_is_finite(cut: bool) -> None:
    """The compiler computes the bfloat16 product again, in float32: no element of it equals the range."""
    torch.manual_seed(0)
    x, gate, weight = (torch.randn(64, 64, requires_grad=True) for _ in range(3))
    fractions = torch.tensor([0.9, 0.9])

    def loss() -> Tensor:
        inner = torch.nn.functional.silu(x @ gate) * (x @ weight)
        inner = clipped(inner, fractions) if cut else inner
        return (quantize_tokens(inner, GRID) @ weight).float().square().mean()

    gradients = []
    for function in (loss, torch.compile(loss, dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16):
            value = function()
        gradients.append(torch.autograd.grad(value, (x, gate, weight)))
    for name, plain, compiled in zip(("x", "gate", "weight"), *gradients, strict=True):
        assert_close(name, plain, compiled, 0.2)
