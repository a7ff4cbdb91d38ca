"""Where blocks of a launch leave what others add up."""

from __future__ import annotations

import torch

from aq_lightning.kernels.workspace import counters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_launches_in_flight_count_in_different_places() -> None:
    device = torch.device(DEVICE)
    places = [counters(device, 5).data_ptr() for _ in range(100)]
    assert len(set(places)) == 100
    assert not counters(device, 2**20 + 1).any() and not counters(device, 2**20).any()
