"""Kronecker products move to the one layer that reads what they multiply, and run in its kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deployed import IDS, ONLINE, expected
from helpers import assert_close, relative_error
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from aq_lightning import deploy
from aq_lightning.deploy import linear as packed
from aq_lightning.transforms.online import carried

MOVED = ("model.layers.0.self_attn.q_proj.joint.linear", ONLINE[1])


@torch.no_grad()
def open_packed(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def carriers(model: PreTrainedModel) -> tuple[str, ...]:
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[module] for module, _ in carried(model))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of each call of the operator."""
    found: list[int] = []
    original = packed.kronecker_matmul

    def kronecker_matmul(x, by, weight, *more):
        found.append(weight.scales.shape[1])
        return original(x, by, weight, *more)

    monkeypatch.setattr(packed, "kronecker_matmul", kronecker_matmul)
    return found


@pytest.mark.parametrize("scheme, tolerance", [("w4a8", 2e-2), ("w4a4", 0.2)])
@torch.no_grad()
def test_a_product_runs_once_with_its_rounding(checkpoint: Callable[..., Path], runs, scheme, tolerance) -> None:
    directory = checkpoint(scheme, online="kronecker")
    model = open_packed(directory)
    plain = model(IDS).logits
    assert carriers(model) == ONLINE and not runs
    fused = deploy.fuse(deploy.fuse(model))
    assert carriers(fused) == MOVED
    assert_close("as before", plain, fused(IDS).logits, 1e-5)
    assert runs == [64 + 2 * 32, 64], "q, k, v at once; down"
    assert_close("as the dequantized model", expected(directory), fused(IDS).logits, tolerance)


@pytest.mark.parametrize("scheme, online", [("w4a16g32", "kronecker"), ("w4a8", "blocks"), ("w4a16kv4", "blocks")])
@torch.no_grad()
def test_other_products_stay_where_they_are(checkpoint: Callable[..., Path], runs, scheme: str, online: str) -> None:
    model = open_packed(checkpoint(scheme, online=online))
    plain = model(IDS).logits
    fused = deploy.fuse(model)
    assert carriers(fused) == ONLINE and not runs
    assert_close("as before", plain, fused(IDS).logits, 1e-5)


@torch.no_grad()
def test_a_norm_that_several_layers_read_keeps_its_product(checkpoint: Callable[..., Path], runs) -> None:
    model = open_packed(checkpoint("w4a8", online="kronecker"))
    model.model.layers[0].self_attn.k_proj.bias = nn.Parameter(torch.randn(32))
    plain = model(IDS).logits
    fused = deploy.fuse(model)
    assert carriers(fused) == ONLINE
    assert_close("as before", plain, fused(IDS).logits, 1e-5)
    assert runs == [64], "down alone"


@pytest.mark.parametrize("joined", [False, True])
@torch.no_grad()
def test_dequantized_again_with_its_products(checkpoint: Callable[..., Path], joined: bool) -> None:
    """Without rounding of activations, which answers nearly the same at 8 bits, but not without the products."""
    directory = checkpoint("w4a8", online="kronecker")
    model = open_packed(directory)
    dequantized = (deploy.fuse(model) if joined else model).dequantize().float()
    assert_close("dequantized", expected(directory), dequantized(IDS).logits, 5e-2)
    for _, online in carried(dequantized):
        online[0].right.copy_(torch.eye(8))
    assert relative_error(expected(directory), dequantized(IDS).logits) > 5e-2, "control"


@torch.no_grad()
def test_expanded_for_a_cpu_it_multiplies_first(checkpoint: Callable[..., Path], runs) -> None:
    directory = checkpoint("w4a8", online="kronecker")
    model, _ = deploy.load(str(directory), torch.device("cpu"))
    assert carriers(model) == MOVED
    assert_close("w4a8", expected(directory), model(IDS).logits, 1e-6)
    assert not runs
