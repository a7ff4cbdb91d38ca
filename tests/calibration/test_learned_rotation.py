"""Rotations are learnt through the whole model, and only what is rounded tells one from another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from helpers import assert_close
from tiny import MODELS, tiny, tiny_config
from torch.utils.data import DataLoader

from aq_lightning.calibration import capture
from aq_lightning.calibration.learned_rotation import RotationFit, Text, full_answers
from aq_lightning.models.lookup import architecture_of
from aq_lightning.models.pretrained import Pretrained, Source
from aq_lightning.objectives import BlockMSE
from aq_lightning.optimizers.cayley_sgd import turned
from aq_lightning.quantizers import MinMax, quantized
from aq_lightning.recipe import LearningRates, Recipe, StreamStorage, WindowPlan
from aq_lightning.rounders import Nearest
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Dense, Kronecker, Rotation, RotationTraining

ROTATED = [name for name in MODELS if architecture_of(tiny_config(name)).final_norm]
CPU = torch.device("cpu")
SCHEME = Scheme.parse("w4a4kv4")
TRANSFORMS = {
    "query_key": [partial(Dense, form="fixed", start="hadamard", shared=True, online=True)],
    "mlp_hidden": [partial(Kronecker, form="fixed", start="hadamard")],
}


def recipe(model: str, **training: object) -> Recipe:
    """Experts have no place for online products."""
    experts = architecture_of(tiny_config(model)).experts
    inside = {site: each for site, each in TRANSFORMS.items() if site == "query_key" or not experts}
    return Recipe(
        scheme=SCHEME, transforms=inside, weight_quantizer=MinMax, rounder=Nearest(), objective=BlockMSE(),
        optimizer=torch.optim.Adam, learning_rates=LearningRates(0.0, 0.0), decay="none", batch_size=2,
        plan=WindowPlan(), streams=StreamStorage("float32", "host"), compiled=False, captured=False, layout="padded",
        rotation=Rotation("random", training=RotationTraining(**training)),
    )  # fmt: skip


def prepared(name: str, objective: str = "tokens") -> tuple[RotationFit, Recipe]:
    small = tiny(name, torch.float32)
    small.model.config.dtype = torch.float32
    model, plan = Pretrained(Source("random"), small.model, None, small.architecture), recipe(name, objective=objective)
    windows = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1))
    shell = model.shell()
    text = Text(windows, *capture(shell, windows, plan.streams, CPU), None)
    if objective == "divergence":
        text = Text(windows, text.stream, text.arguments, full_answers(model, text, 2, CPU))
    return RotationFit(model, shell, text, plan), plan


def loss(module: RotationFit) -> torch.Tensor:
    return module.training_step(torch.arange(4), 0)


@pytest.mark.parametrize("name", ROTATED)
def test_unrounded_every_rotation_is_the_model(name: str) -> None:
    module, _ = prepared(name)
    windows = module.text.windows
    expected = tiny(name, torch.float32).model(input_ids=windows, labels=windows, use_cache=False).loss
    assert_close("start", expected, loss(module), 1e-5)
    with torch.no_grad():
        for matrices in (module.stream, module.values):
            matrices.copy_(torch.linalg.qr(torch.randn_like(matrices))[0])
        assert_close("another", expected, loss(module), 1e-5)
        module.stream[0] *= 1.5
        assert abs(float(loss(module) / expected) - 1) > 1e-4, "negative control: no rotation"


@contextmanager
def bent(module: RotationFit) -> Iterator[None]:
    """While it is open, linears read what is no longer the same in every basis, and still smooth."""
    with ExitStack() as hooks:
        for linear in (each for each in module.blocks.modules() if isinstance(each, torch.nn.Linear)):
            hooks.enter_context(linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),)))
        yield


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("objective", ["tokens", "divergence"])
def test_gradients_along_the_rotations(name: str, objective: str) -> None:
    """Small steps change the loss by what the gradients say."""
    module, _ = prepared(name, objective)
    with bent(module):
        loss(module).backward()
        for matrix in (module.stream, module.values):
            origin, slope, rate = matrix.detach().clone(), matrix.grad, 0.003
            direction = slope / (slope @ origin.mT - origin @ slope.mT).norm()
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    matrix.copy_(turned(origin, sign * direction, rate))
                    found.append(float(loss(module)))
                    moved = (matrix - origin) * sign
            expected = float((slope * moved).sum())
            matrix.data.copy_(origin)
            assert expected < 0 and abs((found[0] - found[1]) / 2 / expected - 1) < 0.05


@pytest.mark.parametrize("name", ROTATED)
def test_rounded_activations_have_gradients(name: str) -> None:
    module, plan = prepared(name)
    with quantized([each.block for each in module.blocks], plan.scheme):
        loss(module).backward()
    for slope in (module.stream.grad, *module.values.grad):
        assert torch.isfinite(slope).all() and slope.norm() > 0
    assert all(not parameter.requires_grad for name, parameter in module.named_parameters() if "." in name)


@torch.no_grad()
def test_the_full_precision_model_diverges_from_itself_by_nothing() -> None:
    module, plan = prepared("llama", "divergence")
    assert float(loss(module)) < 1e-6
    with quantized([each.block for each in module.blocks], plan.scheme):
        assert float(loss(module)) > 1e-3


def test_the_mean_over_all_windows() -> None:
    module, _ = prepared("llama")
    for index, batch in enumerate(DataLoader(range(4), 3)):
        module.test_step(batch, index)
    assert_close("mean", loss(module), module.loss.compute(), 1e-6)
