"""LLaMA 1, 2, 3 and the models that share their layout (SmolLM2, Vicuna, Yi, …)."""

from __future__ import annotations

from types import MappingProxyType

from aq_lightning.models.sites import Architecture, Group, Site

SPEC = Architecture(
    blocks="model.layers",
    sites=(
        Site(
            name="attention_input",
            producer="input_layernorm",
            consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            absorbs=frozenset({Group.DIAGONAL, Group.SHIFT}),
        ),
        Site(
            name="query_key",
            producer="self_attn.q_proj",
            dual="self_attn.k_proj",
            absorbs=frozenset({Group.ROPE}),
            per_head=True,
        ),
        Site(
            name="value_output",
            producer="self_attn.v_proj",
            consumers=("self_attn.o_proj",),
            absorbs=frozenset({Group.DIAGONAL, Group.HEAD, Group.SHIFT}),
            per_head=True,
        ),
        Site(
            name="mlp_input",
            producer="post_attention_layernorm",
            consumers=("mlp.gate_proj", "mlp.up_proj"),
            absorbs=frozenset({Group.DIAGONAL, Group.SHIFT}),
        ),
        Site(name="mlp_hidden", producer="mlp.up_proj", consumers=("mlp.down_proj",)),
    ),
    bias_switches=MappingProxyType(
        {
            "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        }
    ),
)
