"""Phi 3 and 3.5 mini, Phi 4: LLaMA's sites with q, k and v in one linear, gate and up in another; partial rotary."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from aq_lightning.models import llama
from aq_lightning.models.sites import Architecture, Fused, Site

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"

SPEC = Architecture(
    blocks="model.layers",
    sites=(
        replace(llama.ATTENTION_INPUT, consumers=(QKV,)),
        replace(llama.QUERY_KEY, producer=f"{QKV}:q", dual=f"{QKV}:k"),
        replace(llama.VALUE_OUTPUT, producer=f"{QKV}:v"),
        replace(llama.MLP_INPUT, consumers=(GATE_UP,)),
        Site(name="mlp_hidden", producer=f"{GATE_UP}:up", consumers=("mlp.down_proj",)),
    ),
    fused=MappingProxyType(
        {
            QKV: Fused(parts=("q", "k", "v"), heads=("query", "key_value", "key_value")),
            GATE_UP: Fused(parts=("gate", "up")),
        }
    ),
    attention="self_attn",
    final_norm="model.norm",
)
