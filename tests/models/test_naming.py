"""Experts go to checkpoints under the names that transformers itself gives them, and come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MODELS, tiny

from aq_lightning.calibration.attach import install, weights
from aq_lightning.errors import RequestError
from aq_lightning.models.naming import from_checkpoint, to_checkpoint
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import MinMax
from aq_lightning.scheme import Grid

EXPERTS = ["mixtral", "qwen3_moe"]


@pytest.mark.parametrize("name", list(MODELS))
def test_names_and_contents_are_those_that_transformers_saves(name: str, tmp_path: Path) -> None:
    """Of every tensor of the first block, in every architecture."""
    model = tiny(name, torch.float32)
    model.model.save_pretrained(tmp_path)
    prefix = f"{model.architecture.blocks}.0."
    saved = load_file(tmp_path / "model.safetensors")
    saved = {key.removeprefix(prefix): tensor for key, tensor in saved.items() if key.startswith(prefix)}
    block = model.blocks[0]
    ours = to_checkpoint(dict(block.named_parameters()), model.architecture, block)
    assert ours.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in ours.items())
    back = from_checkpoint({prefix + key: tensor for key, tensor in saved.items()}, model.architecture)
    assert back.keys() == {prefix + key for key, _ in block.named_parameters()}
    assert all(torch.equal(back[prefix + key], parameter) for key, parameter in block.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_quantized_each_alone(name: str, symmetric: bool) -> None:
    """Stacked or not, the integers of an expert's linear are the same; in the block their weights return."""
    model, grid = tiny(name, torch.float32), Grid(3, 8, symmetric)
    block = model.blocks[0]

    def rounded(weight: torch.Tensor) -> QTensor:
        return MinMax(grid, tuple(weight.flatten(0, -2).shape), torch.float16).quantize(weight)

    stacked = {key: rounded(weight) for key, weight in weights(block).items()}
    named = to_checkpoint(stacked, model.architecture, block)
    alone = to_checkpoint(dict(weights(block)), model.architecture, block)
    assert named.keys() == alone.keys()
    for key, weight in alone.items():
        expected = rounded(weight)
        assert all(torch.equal(getattr(named[key], p), getattr(expected, p)) for p in ("codes", "scale", "zero"))
    back = from_checkpoint(named, model.architecture)
    assert back.keys() == stacked.keys()
    assert all(torch.equal(back[key].codes, tensor.codes) for key, tensor in stacked.items())
    shapes = {key: parameter.shape for key, parameter in block.named_parameters()}
    expected = {key: MinMax(grid, tuple(w.flatten(0, -2).shape), torch.float16)(w) for key, w in weights(block).items()}
    install(block, back)
    assert {key: parameter.shape for key, parameter in block.named_parameters()} == shapes
    assert all(torch.equal(weights(block)[key], weight) for key, weight in expected.items())


def test_missing_expert_is_refused() -> None:
    model = tiny("mixtral")
    named = to_checkpoint(dict(model.blocks[0].named_parameters()), model.architecture, model.blocks[0])
    del named["block_sparse_moe.experts.1.w3.weight"]
    with pytest.raises(RequestError, match="every linear of every expert, got 7 of 8 for mlp.experts.gate_up_proj"):
        from_checkpoint(named, model.architecture)
