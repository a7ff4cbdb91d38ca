"""Qwen 1.5, 2 and 2.5: LLaMA's sites; q, k and v always have biases, the other linears never."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from aq_lightning.models.llama import SPEC as LLAMA

SPEC = replace(LLAMA, bias_switches=MappingProxyType({}))
