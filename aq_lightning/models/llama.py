"""LLaMA 1, 2, 3 and the models that share their layout (SmolLM2, Vicuna, Yi, …)."""

from __future__ import annotations

from types import MappingProxyType

from aq_lightning.models.sites import AROUND_ROPE, BEHIND_NORM, THROUGH_ATTENTION, Architecture, Site

ATTENTION_INPUT = Site(
    name="attention_input",
    producer="input_layernorm",
    consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    absorbs=BEHIND_NORM,
)
QUERY_KEY = Site(
    name="query_key", producer="self_attn.q_proj", dual="self_attn.k_proj", absorbs=AROUND_ROPE, per_head=True
)
VALUE_OUTPUT = Site(
    name="value_output",
    producer="self_attn.v_proj",
    consumers=("self_attn.o_proj",),
    absorbs=THROUGH_ATTENTION,
    per_head=True,
)
MLP_INPUT = Site(
    name="mlp_input",
    producer="post_attention_layernorm",
    consumers=("mlp.gate_proj", "mlp.up_proj"),
    absorbs=BEHIND_NORM,
)
MLP_HIDDEN = Site(name="mlp_hidden", producer="mlp.up_proj", consumers=("mlp.down_proj",))
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")

SPEC = Architecture(
    blocks="model.layers",
    sites=(ATTENTION_INPUT, QUERY_KEY, VALUE_OUTPUT, MLP_INPUT, MLP_HIDDEN),
    bias_switches=MappingProxyType(
        {"attention_bias": ATTENTION, "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    ),
    attention="self_attn",
    final_norm="model.norm",
)
