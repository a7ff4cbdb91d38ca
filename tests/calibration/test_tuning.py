"""Tuning of scales and norms: the right gradient, codes untouched, and a model nearer to the one it comes from."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from fitting import LIGHTNING
from helpers import assert_close, tiny_llama
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from aq_lightning.calibration.tuning import FromCodes, ScaleTuning, WholeModel, divergence
from aq_lightning.qtensor import QTensor, encode, grid_of
from aq_lightning.scheme import Grid

pytestmark = LIGHTNING
GRID = Grid(3, 16)


def quantized(weight: torch.Tensor) -> QTensor:
    groups = weight.unflatten(1, (-1, GRID.group_size))
    scale, zero = grid_of(groups.amin(-1), groups.amax(-1), GRID, torch.float16)
    codes = encode(groups, scale[..., None], zero[..., None], GRID).flatten(1)
    return QTensor(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), GRID)


def whole(**changes: object) -> WholeModel:
    teacher = tiny_llama()
    student = deepcopy(teacher)
    tensors = {
        f"model.layers.{name}.weight": quantized(linear.weight.detach())
        for name, linear in student.model.layers.named_modules()
        if isinstance(linear, torch.nn.Linear)
    }
    tuning = ScaleTuning(**{"epochs": 6, "optimizer": torch.optim.AdamW, "scales": 3e-3, "norms": 3e-3, **changes})
    return WholeModel(student, teacher, "model.layers", tensors, tuning)


def tokens() -> torch.Tensor:
    return torch.randint(96, (8, 16), generator=torch.Generator().manual_seed(0))


def trained(module: WholeModel) -> WholeModel:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    Trainer(accelerator="cpu", max_epochs=module.tuning.epochs, **quiet).fit(module, DataLoader(tokens(), batch_size=4))
    return module


def loss(module: WholeModel) -> float:
    with torch.no_grad():
        pairs = zip(module.teacher(tokens()).logits, module.student(tokens()).logits, strict=True)
        return float(torch.stack([divergence(p, q) for p, q in pairs]).mean())


def test_weights_and_their_gradient_are_those_of_plain_autograd() -> None:
    tensor = quantized(torch.randn(8, 48))
    module, ratio = FromCodes(tensor), torch.zeros(8, 3, requires_grad=True)
    assert torch.equal(module(ratio), tensor.dequantize(torch.float32))
    cotangent = torch.randn(8, 48)
    (got,) = torch.autograd.grad((module(ratio) * cotangent).sum(), ratio)
    parts = (tensor.dequantize(torch.float32) * cotangent).unflatten(1, (3, -1)).sum(-1)
    assert_close("d ratio", parts, got, 1e-5)


def test_divergence_is_none_from_itself_and_matches_its_definition() -> None:
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    assert float(divergence(p, p)) == pytest.approx(0, abs=1e-6)
    expected = (p.softmax(-1) * (p.softmax(-1) / q.softmax(-1)).log()).sum(-1).mean()
    assert float(divergence(p, q)) == pytest.approx(float(expected), rel=1e-4)


def test_tuning_brings_the_model_nearer_and_leaves_codes_alone() -> None:
    module = whole()
    before, start = module.tuned(), loss(module)
    after = trained(module).tuned()
    assert loss(module) < 0.8 * start
    for name, tensor in before.items():
        if isinstance(tensor, QTensor):
            assert torch.equal(tensor.codes, after[name].codes) and torch.equal(tensor.zero, after[name].zero)
            assert after[name].scale.dtype == torch.float16
            assert not torch.equal(tensor.scale, after[name].scale), name


def test_what_is_written_is_what_was_trained() -> None:
    module = trained(whole(epochs=2))
    written = deepcopy(module.teacher)
    for name, tensor in module.tuned().items():
        value = tensor.dequantize(torch.float32) if isinstance(tensor, QTensor) else tensor
        written.get_parameter(name).data.copy_(value)
    assert torch.equal(written(tokens()).logits, module.student(tokens()).logits)


def test_no_steps_change_nothing() -> None:
    module = whole(scales=0.0, norms=0.0, epochs=1)
    before = loss(module)
    assert loss(trained(module)) == before
