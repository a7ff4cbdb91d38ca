"""GPT-NeoX and Pythia: LayerNorm, biases, fused q, k, v of each head; rotary embedding on part of each head.

Attention and MLP have a norm each, whether their residuals are parallel or not. A GELU lies between the MLP's linears,
so that nothing folds there.
"""

from __future__ import annotations

from types import MappingProxyType

from aq_lightning.models.sites import AROUND_ROPE, BEHIND_NORM, THROUGH_ATTENTION, Architecture, Fused, Site

QKV, OUT = "attention.query_key_value", "attention.dense"

SPEC = Architecture(
    blocks="gpt_neox.layers",
    sites=(
        Site("attention_input", "input_layernorm", (QKV,), absorbs=BEHIND_NORM),
        Site("query_key", f"{QKV}:q", dual=f"{QKV}:k", absorbs=AROUND_ROPE, per_head=True),
        Site("value_output", f"{QKV}:v", (OUT,), absorbs=THROUGH_ATTENTION, per_head=True),
        Site("mlp_input", "post_attention_layernorm", ("mlp.dense_h_to_4h",), absorbs=BEHIND_NORM),
    ),
    bias_switches=MappingProxyType({"attention_bias": (QKV, OUT)}),
    fused=MappingProxyType({QKV: Fused(("q", "k", "v"), ("query", "key_value", "key_value"), interleaved=True)}),
    stored=MappingProxyType({"lm_head": "embed_out"}),
    attention="attention",
    key_value_heads="num_attention_heads",
)
