"""Steps that are recorded and replayed end where the plain ones end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from fitting import LIGHTNING, Sabotage, fitted
from recorder import Recorder
from torch import Tensor

from aq_lightning.calibration import Cause, captured
from aq_lightning.transforms import Affine

pytestmark = LIGHTNING


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(captured, "Graph", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


def test_recorded_steps_are_the_plain_ones(recorders: list[Recorder]) -> None:
    plain, replayed = fitted(captured=False), fitted(captured=True)
    assert [recorder.replays for recorder in recorders] == [8, 8], "2 steps in each of 4 epochs"
    assert plain.losses == replayed.losses
    for name, tensor in plain.module.own().items():
        assert torch.equal(tensor, replayed.module.own()[name]), name


def test_a_last_batch_of_another_size_is_not_replayed(recorders: list[Recorder]) -> None:
    plain, replayed = (fitted(captured=captured, batch=3) for captured in (False, True))
    assert recorders[0].replays == 8, "two of three steps in 4 epochs"
    assert plain.losses == pytest.approx(replayed.losses, rel=1e-5)


def test_only_full_batches_are_recorded(recorders: list[Recorder]) -> None:
    fitted(captured=True, batch=16)  # of 8 samples
    assert not recorders


def test_inverses_with_pivoting_are_not_recorded(recorders: list[Recorder]) -> None:
    fitted(captured=True, affine=partial(Affine, dominance=None))
    assert not recorders


def test_what_is_not_finite_is_found_in_replays_too(recorders: list[Recorder]) -> None:
    result = fitted([Sabotage("value_output.factors.0.log_scale", math.nan, epoch=2)], captured=True)
    assert result.attempts == 2 and result.causes == (Cause(0, "", "loss", None, 2),)


def test_an_inverse_in_doubt_is_recorded_anew(recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    once = iter([True])
    monkeypatch.setattr(Affine, "doubt", lambda self: next(once, False))
    fitted(captured=True)
    assert [recorder.replays for recorder in recorders] == [2, 2, 6, 6]


def test_steps_that_cannot_be_recorded_go_on_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: Callable[[], Tensor], warm_up: int) -> None:
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "Graph", refuse)
    with pytest.warns(UserWarning, match="block 0: steps cannot be recorded .operation not permitted"):
        refused = fitted(captured=True)
    assert refused.losses == fitted(captured=False).losses


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_of_a_gpu(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[captured.Graph] = []

    class Counted(captured.Graph):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(captured, "Graph", Counted)
    plain, replayed = (
        fitted(captured=captured, compiled=compiled, device=torch.device("cuda")) for captured in (False, True)
    )
    assert len(made) == 2
    assert plain.losses == pytest.approx(replayed.losses, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_refused_recording_leaves_the_gpu_usable() -> None:
    def work() -> Tensor:
        return torch.ones((), device="cuda").cpu()  # waits for the device, which a graph cannot

    with pytest.raises(RuntimeError):
        captured.Graph(work, warm_up=0)
    torch.manual_seed(0)
    assert torch.randn(4, device="cuda").isfinite().all()
