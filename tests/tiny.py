"""Tiny random models of every architecture, and what their modules compute in true float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from helpers import with_true_norms
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aq_lightning.experts import run_here
from aq_lightning.models.lookup import architecture_of, heads_of
from aq_lightning.models.sites import Architecture, Heads

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
WIDE_HEADS = {**GROUPED, "head_dim": 24}  # 4 · 24 ≠ 64
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
FALCON = {"max_position_embeddings": 128, "ffn_hidden_size": 96}
FALCON_NEW = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}
GPT_NEOX = {"intermediate_size": 96, "max_position_embeddings": 128}

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", GROUPED),
    "llama-biased": ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {**WIDE_HEADS, "sliding_window": 6}),
    "qwen2": ("qwen2", {**GROUPED, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6}),
    "qwen3": ("qwen3", WIDE_HEADS),
    "mixtral": ("mixtral", {**WIDE_HEADS, "sliding_window": 6, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**WIDE_HEADS, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3}),
    "qwen3_moe-biased": ("qwen3_moe", {**WIDE_HEADS, "moe_intermediate_size": 32, "num_experts": 3,
                                       "num_experts_per_tok": 1, "norm_topk_prob": True, "attention_bias": True}),
    "gemma2": ("gemma2", {**WIDE_HEADS, **SLIDING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 24}),
    "gemma3_text": ("gemma3_text", {**WIDE_HEADS, **SLIDING, "query_pre_attn_scalar": 24}),
    "phi3": ("phi3", GROUPED),
    "phi3-partial": ("phi3", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                              "partial_rotary_factor": 0.75}}),
    "opt": ("opt", {"ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 64}),
    "opt-unbiased": ("opt", {"ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 32,
                             "enable_bias": False}),
    "opt-gelu": ("opt", {"ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 64,
                         "activation_function": "gelu"}),
    "gpt_neox": ("gpt_neox", GPT_NEOX),
    "gpt_neox-sequential": ("gpt_neox", {**GPT_NEOX, "use_parallel_residual": False, "attention_bias": False}),
    "falcon-40b": ("falcon", FALCON_NEW),
    "falcon-11b": ("falcon", {**FALCON_NEW, "num_ln_in_parallel_attn": 1}),
    "falcon-7b": ("falcon", FALCON),
    "falcon-rw": ("falcon", {**FALCON_RW, "bias": True}),
    "bloom": ("bloom", {}),
}  # fmt: skip
"""Name → model type and what its configuration adds to :data:`COMMON`."""


@dataclass(frozen=True)
class Tiny:
    """A tiny model whose architecture the engine knows."""

    model: PreTrainedModel
    architecture: Architecture
    heads: Heads

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.architecture.blocks)


class Call(NamedTuple):
    """What a block was called with, and what it answered."""

    hidden: Tensor
    others: dict[str, object]
    answer: Tensor


def tiny_config(name: str, **changes: object) -> AutoConfig:
    """Configuration of one of :data:`MODELS`."""
    model_type, fields = MODELS[name]
    return AutoConfig.for_model(model_type, **{**COMMON, **fields, **changes})


def tiny(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> Tiny:
    """One of :data:`MODELS` with every parameter random, its norms as precise as ``dtype``."""
    config = tiny_config(name, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(dtype)
    run_here(model.config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * 2 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    architecture = architecture_of(config)
    return Tiny(with_true_norms(model), architecture, heads_of(config, architecture))


def avoided_expert(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose routers choose 2 of 5 experts, so changed that none ever chooses expert 0.

    It always scores 0, where of the other four, opposite in Pairs, two score more.
    """
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            assert module.weight.shape[0] == 5 and module.top_k == 2
            module.weight[0] = 0
            module.weight[3:] = -module.weight[1:3]
    return model


def called(tiny: Tiny, index: int = 0, tokens: Tensor | None = None) -> Call:
    """How the model itself calls one of its blocks."""
    seen: list[Call] = []
    hook = tiny.blocks[index].register_forward_hook(
        lambda _, inputs, others, output: seen.append(
            Call(inputs[0], others, output[0] if tiny.architecture.returns_tuple else output)
        ),
        with_kwargs=True,
    )
    tiny.model(torch.randint(3, 96, (2, 16)) if tokens is None else tokens, use_cache=False)
    hook.remove()
    return seen[0]


@contextmanager
def true_softmax() -> Iterator[None]:
    """Softmax in float64 (HF's eager attention and routers compute it in float32 whatever they are given)."""
    narrow = Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", lambda x, dim=-1, dtype=None, **_: torch.softmax(x, dim))
        patch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))
        yield
