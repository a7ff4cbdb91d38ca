"""Batches on their way to a GPU are those that would be read in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aq_lightning.calibration import Pairs, batches
from aq_lightning.calibration.upload import Upload, one_ahead

GPU = torch.device("cuda")


class Late:
    """What an upload does, without a GPU: what was not finished is not there."""

    def __init__(self, device: torch.device) -> None:
        self.arriving: list[tuple[Tensor, Tensor]] = []

    def start(self, stream: Tensor, places: list[int]) -> Tensor:
        copy = torch.full((len(places), *stream.shape[1:]), torch.nan)
        self.arriving.append((copy, stream[places]))
        return copy

    def finish(self, *copies: Tensor) -> None:
        for copy, values in self.arriving:
            if any(copy is each for each in copies):
                copy.copy_(values)


def pairs(device: torch.device | None) -> Pairs:
    stream = torch.arange(10.0)[:, None, None].expand(10, 2, 3)
    return Pairs(stream, -stream, 4, 0, device=device)


def test_the_next_starts_before_one_is_handed_out() -> None:
    said: list[str] = []

    def note(word: str, value: int) -> int:
        said.append(f"{word} {value}")
        return value

    for value in one_ahead(range(3), lambda each: note("start", each), lambda each: note("finish", each)):
        note("work", value)
    assert said == [
        *("start 0", "start 1", "finish 0", "work 0"),
        *("start 2", "finish 1", "work 1"),
        *("finish 2", "work 2"),
    ]
    assert list(one_ahead([], str, str)) == []


def test_batches_are_the_same_and_so_is_what_is_left_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "Upload", Late)
    for here, there in zip(pairs(None), pairs(GPU), strict=True):
        assert torch.equal(here.inputs, there.inputs) and torch.equal(here.targets, there.targets)
        assert here.total == there.total
    begun, resumed = pairs(GPU), pairs(GPU)
    left = iter(begun)
    next(left)
    resumed.load_state_dict(begun.state_dict())
    for one, other in zip(left, resumed, strict=True):
        assert torch.equal(one.inputs, other.inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_them_there() -> None:
    stream = torch.randn(64, 128, 256).pin_memory()
    upload, orders = Upload(GPU), torch.randperm(64).split(4)
    arrived = one_ahead(orders, lambda each: upload.start(stream, each.tolist()), lambda x: upload.finish(x) or x)
    for places, batch in zip(orders, arrived, strict=True):
        assert torch.equal(batch.cpu(), stream[places])
