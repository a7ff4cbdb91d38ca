"""Gemma 2: norms multiply by 1 + weight, and the MLP has its own; soft-capped logits and sliding windows do not matter.

The norms behind attention and MLP are no sites: a map does not pass through a norm. transformers 5.17 picks an
attention that leaves the soft-capping out unless told ``attn_implementation="eager"``; 5.23 picks eager by itself.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from aq_lightning.models.llama import ATTENTION, ATTENTION_INPUT, MLP_HIDDEN, QUERY_KEY, VALUE_OUTPUT
from aq_lightning.models.llama import MLP_INPUT as LLAMA_MLP_INPUT
from aq_lightning.models.sites import Architecture

MLP_INPUT = replace(LLAMA_MLP_INPUT, producer="pre_feedforward_layernorm")

SPEC = Architecture(
    blocks="model.layers",
    sites=(ATTENTION_INPUT, QUERY_KEY, VALUE_OUTPUT, MLP_INPUT, MLP_HIDDEN),
    bias_switches=MappingProxyType({"attention_bias": ATTENTION}),
    gain_offset=1.0,
    attention="self_attn",
)
