"""Mixtral: Mistral's attention, and in place of one MLP a router and experts, all of which read one norm."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from aq_lightning.models import llama
from aq_lightning.models.sites import Architecture, Fused, Site

ROUTER, GATE_UP, DOWN = "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
MLP_INPUT = replace(llama.MLP_INPUT, consumers=(ROUTER, GATE_UP))
MLP_HIDDEN = Site(name="mlp_hidden", producer=f"{GATE_UP}:up", consumers=(DOWN,), per_expert=True)
FUSED = MappingProxyType({GATE_UP: Fused(parts=("gate", "up"))})

SPEC = Architecture(
    blocks="model.layers",
    sites=(llama.ATTENTION_INPUT, llama.QUERY_KEY, llama.VALUE_OUTPUT, MLP_INPUT, MLP_HIDDEN),
    fused=FUSED,
    experts=MappingProxyType(
        {
            GATE_UP: ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
            DOWN: ("block_sparse_moe.experts.*.w2",),
        }
    ),
    stored=MappingProxyType({ROUTER: "block_sparse_moe.gate"}),
    attention="self_attn",
    final_norm="model.norm",
)
