"""Falcon: fused q, k, v of each key-value head; four layouts of norms and heads, one for each released family.

Its linears read their weight themselves, so transformers cannot run them compressed: a quantized checkpoint is loaded
with ``quantization_config=CompressedTensorsConfig(run_compressed=False)``.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from aq_lightning.models.sites import (
    AROUND_ROPE,
    BEHIND_NORM,
    THROUGH_ATTENTION,
    WITHOUT_ROPE,
    Architecture,
    Fused,
    Site,
)

QKV, OUT, UP, DOWN = "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
QUERY_KEY = Site("query_key", f"{QKV}:q", dual=f"{QKV}:k", absorbs=AROUND_ROPE, per_head=True)
VALUE_OUTPUT = Site("value_output", f"{QKV}:v", (OUT,), absorbs=THROUGH_ATTENTION, per_head=True)
PARALLEL = {"parallel_attn": (True,), "alibi": (False,)}
OLD = {"new_decoder_architecture": (False,)}

TWO_NORMS = Architecture(  # 40B, 180B
    blocks="transformer.h",
    sites=(
        Site("attention_input", "ln_attn", (QKV,), absorbs=BEHIND_NORM),
        QUERY_KEY,
        VALUE_OUTPUT,
        Site("mlp_input", "ln_mlp", (UP,), absorbs=BEHIND_NORM),
    ),
    bias_switches=MappingProxyType({"bias": (QKV, OUT, UP, DOWN)}),
    requires=MappingProxyType({**PARALLEL, "new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (2, None)}),
    fused=MappingProxyType({QKV: Fused(("q", "k", "v"), ("query", "key_value", "key_value"), interleaved=True)}),
    key_value_heads="num_kv_heads",
    returns_tuple=True,
    per_sample=("alibi",),
)
ONE_NORM = replace(  # Falcon2 11B: attention and MLP read the same norm
    TWO_NORMS,
    sites=(Site("attention_input", "input_layernorm", (QKV, UP), absorbs=BEHIND_NORM), QUERY_KEY, VALUE_OUTPUT),
    requires=MappingProxyType({**PARALLEL, "new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (1,)}),
)
MULTI_QUERY = replace(  # 7B
    ONE_NORM,
    requires=MappingProxyType({**PARALLEL, **OLD, "multi_query": (True,), "num_ln_in_parallel_attn": (1, None)}),
    key_value_heads=1,
)
SEQUENTIAL = replace(  # RW 1B, 7B: every head has its own key and value, ALiBi instead of rotary embedding
    TWO_NORMS,
    sites=(
        Site("attention_input", "input_layernorm", (QKV,), absorbs=BEHIND_NORM),
        replace(QUERY_KEY, absorbs=WITHOUT_ROPE),
        VALUE_OUTPUT,
        Site("mlp_input", "post_attention_layernorm", (UP,), absorbs=BEHIND_NORM),
    ),
    requires=MappingProxyType({**OLD, "multi_query": (False,), "parallel_attn": (False,), "alibi": (True,)}),
    key_value_heads="num_attention_heads",
)

SPEC = (TWO_NORMS, ONE_NORM, MULTI_QUERY, SEQUENTIAL)
