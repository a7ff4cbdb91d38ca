"""Every entry moves by the step size, against its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aq_lightning.errors import RequestError
from aq_lightning.optimizers import SignSGD


def test_steps_by_hand() -> None:
    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))
    optimizer = SignSGD([{"params": [first], "lr": 0.25}, {"params": [second, nn.Parameter(torch.ones(1))]}], lr=1.0)
    first.grad, second.grad = torch.tensor([1e-9, -3.0, 0.0, 2.0]), torch.tensor([-1.0, 1.0])
    optimizer.step()
    assert first.tolist() == [-0.25, 0.25, 0.0, -0.25] and second.tolist() == [1.0, -1.0]
    assert not optimizer.state


def test_closure_computes_the_gradient() -> None:
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = SignSGD([parameter], lr=0.5)

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9.0 and parameter.item() == 2.5


def test_negative_step_size_is_refused() -> None:
    with pytest.raises(RequestError, match="0 or more, got -1"):
        SignSGD([nn.Parameter(torch.zeros(1))], lr=-1)
