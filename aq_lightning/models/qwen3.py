"""Qwen 3, dense: LLaMA's sites, but queries and keys are normalized per head, so only those norms' gains can fold."""

from __future__ import annotations

from types import MappingProxyType

from aq_lightning.models.llama import ATTENTION, ATTENTION_INPUT, MLP_HIDDEN, MLP_INPUT, VALUE_OUTPUT
from aq_lightning.models.sites import Architecture, Group, Site

QUERY_KEY = Site(
    name="query_key",
    producer="self_attn.q_norm",
    dual="self_attn.k_norm",
    absorbs=frozenset({Group.ROPE_RADIUS}),
)

SPEC = Architecture(
    blocks="model.layers",
    sites=(ATTENTION_INPUT, QUERY_KEY, VALUE_OUTPUT, MLP_INPUT, MLP_HIDDEN),
    bias_switches=MappingProxyType({"attention_bias": ATTENTION}),
    attention="self_attn",
    final_norm="model.norm",
)
