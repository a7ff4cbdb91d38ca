"""Qwen 3 mixture of experts: Qwen 3's attention; every block has a router and experts in place of one MLP."""

from __future__ import annotations

from types import MappingProxyType

from aq_lightning.models.llama import ATTENTION, ATTENTION_INPUT, VALUE_OUTPUT
from aq_lightning.models.mixtral import DOWN, FUSED, GATE_UP, MLP_HIDDEN, MLP_INPUT
from aq_lightning.models.qwen3 import QUERY_KEY
from aq_lightning.models.sites import Architecture

SPEC = Architecture(
    blocks="model.layers",
    sites=(ATTENTION_INPUT, QUERY_KEY, VALUE_OUTPUT, MLP_INPUT, MLP_HIDDEN),
    bias_switches=MappingProxyType({"attention_bias": ATTENTION}),
    requires=MappingProxyType({"mlp_only_layers": ([],), "decoder_sparse_step": (1,)}),  # no dense block among them
    fused=FUSED,
    experts=MappingProxyType(
        {
            GATE_UP: ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
            DOWN: ("mlp.experts.*.down_proj",),
        }
    ),
    attention="self_attn",
    final_norm="model.norm",
)
