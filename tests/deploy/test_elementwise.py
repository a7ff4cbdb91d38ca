"""Norms and gates in one pass: the same answers, and nothing that is written otherwise is replaced."""

from __future__ import annotations

import pytest
import torch
from deployed import IDS
from helpers import assert_close, tiny_llama
from tiny import MODELS, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from aq_lightning.deploy.elementwise import join_elementwise


def kinds(model: nn.Module) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in model.named_modules()}


@torch.no_grad()
def test_logits_stay_and_so_do_names() -> None:
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 2)
    before, names = model(IDS).logits, list(model.state_dict())
    joined = join_elementwise(join_elementwise(model))
    found = kinds(joined)
    assert found["model.norm"] == found["model.layers.1.input_layernorm"] == "RMSNorm"
    assert found["model.layers.0.mlp"] == "GatedMLP" and sorted(joined.state_dict()) == sorted(names)
    assert not any(module.training for module in joined.modules())
    assert_close("logits", before, joined(IDS).logits, 1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_architecture_answers_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = IDS % model.config.vocab_size
    before, found = model(ids).logits, kinds(model)
    after = join_elementwise(model)
    assert_close("logits", before, after(ids).logits, 1e-5)
    kind, replaced = model.config.model_type, set(kinds(after).values()) - set(found.values())
    if kind.startswith("gemma"):  # norms scale by 1 + w, gates are not SiLU
        assert not replaced
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        assert replaced == {"RMSNorm", "GatedMLP"}


def test_hooks_and_other_activations_stay() -> None:
    model = tiny_llama()
    seen: list[int] = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    model.model.layers[0].mlp.act_fn = nn.GELU()
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: seen.append(2))
    found = kinds(join_elementwise(model))
    assert found["model.norm"] == "LlamaRMSNorm" and found["model.layers.0.mlp"] == "LlamaMLP"
    assert found["model.layers.1.mlp"] == "LlamaMLP" and found["model.layers.1.input_layernorm"] == "RMSNorm"
    model(IDS)
    assert set(seen) == {1, 2}
