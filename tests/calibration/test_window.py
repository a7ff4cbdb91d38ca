"""Passes in float16 where it reaches, and as they were where it does not; what a window is to answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fitting import CPU, fitted
from helpers import assert_close, relative_error, tiny_llama
from torch import Tensor

from aq_lightning.calibration import LiveWindow, capture
from aq_lightning.calibration.streams import run
from aq_lightning.models.llama import SPEC
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.objectives import BlockMSE
from aq_lightning.recipe import StreamStorage


def window(reach: float = 1.0) -> tuple[LiveWindow, Tensor]:
    """Of the first block, whose MLP multiplies numbers ``reach`` times as great; and what enters it."""
    recipe = fitted(epochs=1).module.recipe
    model = tiny_llama().requires_grad_(False)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight *= reach
    mlp.down_proj.weight /= reach
    pretrained = Pretrained(Source("random"), model, None, SPEC)
    stream, arguments = capture(pretrained.shell(), torch.arange(48).view(3, 16), StreamStorage("float32"), CPU)
    return LiveWindow(pretrained, pretrained.window([0]), arguments, recipe, CPU), stream


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*in eval mode")
def test_float16_where_it_reaches() -> None:
    live, stream = window()
    exact = live.run(stream)
    live._half = True  # as on a GPU with streams in float16
    near = live.run(stream)
    assert not torch.equal(near, exact) and near.dtype == exact.dtype
    assert_close("what the block adds", exact - stream, near - stream, 2e-3)
    assert torch.equal(live.run(stream, exact=True), exact)
    assert live.loss(live.blocks, stream, exact) == pytest.approx(float((near - exact).square().mean()), rel=1e-4)
    assert live.answers(stream, exact.clone())[0] == 0.0


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*in eval mode")
def test_where_float16_does_not_reach_nothing_is_lost() -> None:
    live, stream = window(reach=1e7)
    exact = live.run(stream)
    beyond = run(live.blocks, live.arguments, stream, 2, CPU, half=True)
    assert not beyond.isfinite().all(), "the control: it overflows"
    live._half = True
    assert torch.equal(live.run(stream), exact) and live.loss(live.blocks, stream, exact) == 0.0


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*in eval mode")
def test_what_float16_loses_unseen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    live, stream = window(reach=1e-5)
    exact = live.run(stream)
    lost = run(live.blocks, live.arguments, stream, 2, CPU, half=True)
    assert relative_error(exact - stream, lost - stream) > 1e-2, "the control: all is finite, and wrong"
    live._half = True
    assert torch.equal(live.run(stream), exact)
    live, stream = window(reach=1e7)
    exact = live.run(stream)
    live._half = True
    with monkeypatch.context() as patch:
        patch.setattr(live, "_half_suffices", lambda *_: True)
        assert torch.equal(live.run(stream), exact), "what overflows behind the sample that is looked at"
        assert live.loss(live.blocks, stream, exact) == 0.0
    for block in live.blocks:
        block.mlp.down_proj.weight *= 1e7
        block.mlp.up_proj.weight /= 1e7
    assert not torch.equal(live.run(stream), live.run(stream, exact=True)), "each pass decides for itself"


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*in eval mode")
@pytest.mark.parametrize("same_input", [False, True])
def test_target(same_input: bool) -> None:
    live, stream = window()
    live.recipe = replace(live.recipe, objective=BlockMSE(same_input), batch_size=2)
    full, inputs = live.run(stream), stream + 0.1 * torch.randn(stream.shape)
    expected = live.recipe.objective.target(full, live.run(inputs) if same_input else None)
    assert torch.equal(live.target(full, inputs), expected)
    assert torch.equal(expected, full) is not same_input, "the control"


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*in eval mode")
@pytest.mark.parametrize("same_input", [False, True])
def test_one_pass_gives_the_loss_and_the_answers(same_input: bool) -> None:
    """In the place of a target that nobody else reads, and never in the place of one that is the other stream too."""
    live, stream = window()
    live.recipe = replace(live.recipe, objective=BlockMSE(same_input), batch_size=2)
    full, inputs = live.run(stream), stream + 0.1 * torch.randn(stream.shape)
    target = live.target(full, inputs)
    kept, expected, loss = full.clone(), live.run(inputs, exact=True), live.loss(live.blocks, inputs, target)
    found, answers = live.answers(inputs, target)
    assert found == loss > 0 and torch.equal(answers, expected) and torch.equal(full, kept)
    assert (answers.data_ptr() == target.data_ptr()) is same_input
