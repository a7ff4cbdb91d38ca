"""Float64 parameters are stepped by an optimizer that sees float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from aq_lightning.optimizers import SinglePrecision


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> list[torch.Tensor]:
    """Parameters after steps towards 3, with a rate that a schedule changes."""
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(((each - 3) ** 2).sum() for each in parameters).backward()
        optimizer.step()
        schedule.step()
    return [each.detach().clone() for each in parameters]


def drawn(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(5, 3).to(dtype)), nn.Parameter(torch.randn(4))]


def test_steps_are_those_in_float32() -> None:
    """Groups keep their rates, schedules act, and parameters stay float64."""
    wide, narrow = drawn(torch.float64), drawn(torch.float32)
    groups = [{"params": [wide[0]], "lr": 0.1}, {"params": [wide[1]]}]
    expected = [{"params": [narrow[0]], "lr": 0.1}, {"params": [narrow[1]]}]
    found = stepped(SinglePrecision(groups, partial(AdamW, lr=0.2)), wide, 5)
    for one, other in zip(found, stepped(AdamW(expected, lr=0.2), narrow, 5), strict=True):
        assert torch.equal(one.float(), other)
    assert wide[0].dtype == torch.float64


def test_it_goes_on_from_its_state_and_forgets_when_told() -> None:
    whole, parts = drawn(torch.float64), drawn(torch.float64)
    expected = stepped(SinglePrecision(whole, partial(AdamW, lr=0.1)), whole, 2)
    first = SinglePrecision(parts, partial(AdamW, lr=0.1))
    stepped(first, parts, 1)
    second = SinglePrecision(parts, partial(AdamW, lr=0.1))
    second.load_state_dict(first.state_dict())
    second.param_groups[0] |= {"lr": 0.05, "initial_lr": 0.05}  # where the schedule of the first is
    for one, other in zip(stepped(second, parts, 1), expected, strict=True):
        assert torch.equal(one, other)
    assert len(second.state) == 2 and second.state.pop(parts[0], None) is not None
    assert len(second.state) == 1 and second.state.pop(parts[0], None) is None


def test_eight_bits_of_bitsandbytes_train(fit: Callable[..., Path], tmp_path: Path) -> None:
    """Refused as it is, with the fix; with the fix a run ends."""
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SystemExit) as exit:
        fit("w4a16g32", tmp_path / "refused", "--model.optimizer=bitsandbytes.optim.AdamW8bit")
    assert exit.value.code == 2 and not (tmp_path / "refused").exists()
    fixed = (
        "--model.optimizer=aq_lightning.optimizers.SinglePrecision",
        "--model.optimizer.optimizer=bitsandbytes.optim.AdamW8bit",
    )
    assert (fit("w4a16g32", tmp_path / "run", *fixed) / "results.json").is_file()
