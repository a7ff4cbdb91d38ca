"""BLOOM: LayerNorm, biases everywhere, fused q, k, v of each head; ALiBi only adds to the logits."""

from __future__ import annotations

from types import MappingProxyType

from aq_lightning.models.sites import BEHIND_NORM, THROUGH_ATTENTION, WITHOUT_ROPE, Architecture, Fused, Site

QKV, OUT = "self_attention.query_key_value", "self_attention.dense"

SPEC = Architecture(
    blocks="transformer.h",
    sites=(
        Site("attention_input", "input_layernorm", (QKV,), absorbs=BEHIND_NORM),
        Site("query_key", f"{QKV}:q", dual=f"{QKV}:k", absorbs=WITHOUT_ROPE, per_head=True),
        Site("value_output", f"{QKV}:v", (OUT,), absorbs=THROUGH_ATTENTION, per_head=True),
        Site("mlp_input", "post_attention_layernorm", ("mlp.dense_h_to_4h",), absorbs=BEHIND_NORM),
    ),
    requires=MappingProxyType({"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,)}),
    fused=MappingProxyType({QKV: Fused(("q", "k", "v"), ("query", "key_value", "key_value"), interleaved=True)}),
    key_value_heads="num_attention_heads",
    returns_tuple=True,
    per_sample=("alibi",),
)
