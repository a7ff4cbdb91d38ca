"""OPT and Galactica: LayerNorm, biases, learned positions; post-norm (OPT-350M) is refused, its norms are no sites."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from aq_lightning.models.sites import BEHIND_NORM, THROUGH_ATTENTION, WITHOUT_ROPE, Architecture, Site

Q, K, V, O = (f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))  # noqa: E741

GELU = Architecture(
    blocks="model.decoder.layers",
    sites=(
        Site("attention_input", "self_attn_layer_norm", (Q, K, V), absorbs=BEHIND_NORM),
        Site("query_key", Q, dual=K, absorbs=WITHOUT_ROPE, per_head=True),
        Site("value_output", V, (O,), absorbs=THROUGH_ATTENTION, per_head=True),
        Site("mlp_input", "final_layer_norm", ("fc1",), absorbs=BEHIND_NORM),
    ),
    bias_switches=MappingProxyType({"enable_bias": (Q, K, V, O, "fc1", "fc2")}),
    requires=MappingProxyType({"do_layer_norm_before": (True,), "layer_norm_elementwise_affine": (True,)}),
    attention="self_attn",
    key_value_heads="num_attention_heads",
)
RELU = replace(
    GELU,
    sites=(*GELU.sites, Site("mlp_hidden", "fc1", ("fc2",))),  # max(0, x / s) = max(0, x) / s
    requires=MappingProxyType({**GELU.requires, "activation_function": ("relu",)}),
)

SPEC = (RELU, GELU)
