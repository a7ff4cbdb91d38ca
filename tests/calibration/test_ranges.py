"""The few numbers that the journal keeps of ranges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aq_lightning.calibration import activation_reach, weight_reach
from aq_lightning.calibration.observe import ChannelRange


def seen(*channels: float) -> ChannelRange:
    """Two tokens, the second the first's negative half."""
    one = ChannelRange()
    one.update(torch.tensor([channels, [-value / 2 for value in channels]]))
    return one


def test_reach_of_activations() -> None:
    """The greatest magnitude of either sign, the median over channels, and the worst block."""
    flat, steep = {"norm": [seen(1.0, -1.0, 1.0)]}, {"norm": [seen(-8.0, 2.0, 1.0), ChannelRange()]}
    assert activation_reach([flat]) == {"norm": {"greatest": 1.0, "spread": 1.0}}
    assert activation_reach([flat, steep]) == {"norm": {"greatest": 8.0, "spread": 4.0}}
    assert activation_reach([{"norm": [ChannelRange()]}]) == {}


def test_reach_of_weights() -> None:
    linear = nn.Linear(3, 2, bias=False)
    linear.weight = nn.Parameter(torch.tensor([[1.0, 0.0, -2.0], [-6.0, 0.0, 1.0]]))
    block = nn.ModuleDict({"fc": linear})
    assert weight_reach([block]) == {"fc.weight": {"greatest": 6.0, "spread": 3.0}}


@pytest.mark.parametrize("order", [1, -1])
def test_channels_that_are_mostly_zero_have_no_spread(order: int) -> None:
    ranges = [{"x": [seen(0.0, 0.0, 5.0)]}, {"x": [seen(1.0, 1.0, 2.0)]}][::order]
    assert activation_reach(ranges) == {"x": {"greatest": 5.0, "spread": None}}
