"""Norms, gates and rotary embeddings in one pass: the same answers, and what is written otherwise stays."""

from __future__ import annotations

import pytest
import torch
from deployed import IDS
from helpers import assert_close, tiny_llama
from tiny import MODELS, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from aq_lightning.deploy.elementwise import join_elementwise
from aq_lightning.kernels import rotary
from aq_lightning.kernels.rotary import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the angles of each call of the kernel, which runs on a CPU too."""
    found: list[tuple[int, ...]] = []
    original = triton.rotary

    def kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        found.append(tuple(cos.shape))
        return original(q, k, cos, sin)

    monkeypatch.setattr(triton, "rotary", kernel)
    if DEVICE == "cpu":
        monkeypatch.setattr(rotary, "_one_kernel", rotary._served)
    return found


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.to(DEVICE)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "falcon-7b"])
@torch.no_grad()
def test_queries_and_keys_are_turned_by_one_kernel(turned: list[tuple[int, ...]], name: str) -> None:
    model, ids = model_of(name), IDS[:, :7].to(DEVICE)
    layers = model.config.num_hidden_layers
    before = model(ids).logits
    assert not turned
    joined = join_elementwise(model)
    assert_close("logits", before, joined(ids).logits, 1e-5)
    assert len(turned) == layers and len(set(turned)) == 1 and turned[0][:2] == (1, 7)
    assert_close("once more", before, join_elementwise(joined)(ids).logits, 1e-5)
    assert len(turned) == 2 * layers


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@torch.no_grad()
def test_texts_of_prompts_padded_on_the_left(turned: list[tuple[int, ...]], name: str) -> None:
    """Each has angles of its own, and a cache of fixed length."""
    model, ids = model_of(name), IDS[:, :6].to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {
        "attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "cache_implementation": "static",
        "pad_token_id": 0, "disable_compile": True,
    }  # fmt: skip
    before = model.generate(ids, **options)
    alone = model.generate(ids[1:, 3:], **{**options, "attention_mask": mask[1:, 3:]})
    joined = join_elementwise(model)
    assert torch.equal(joined.generate(ids, **options), before)
    assert {shape[0] for shape in turned} == {2} and {shape[1] for shape in turned} == {1, 6}
    assert torch.equal(before[1:, 3:], alone), "as the prompt without pads"
