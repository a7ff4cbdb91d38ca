"""Modules that carry products."""

from __future__ import annotations

import torch
from torch import nn

from aq_lightning.transforms.online import BlockProduct, carry, drop


def test_a_product_comes_before_the_hooks_that_were_there() -> None:
    """Also where hooks lie in memory: there compiled code of PyTorch 2.11 looks for them."""
    linear, x = nn.Linear(4, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    for _ in range(2):
        linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].round(),))
    before = list(linear._forward_pre_hooks)
    carry(linear, [BlockProduct(inverse=3 * torch.eye(4, dtype=torch.float64)[None])])
    assert torch.equal(linear(x), (3 * x).round() @ linear.weight.T + linear.bias)
    assert list(dict.keys(linear._forward_pre_hooks)) == list(linear._forward_pre_hooks)
    assert list(linear._forward_pre_hooks)[1:] == before
    drop(linear)
    assert list(linear._forward_pre_hooks) == before
