"""Mistral: LLaMA's sites, sliding-window attention, no biases anywhere."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from aq_lightning.models.llama import SPEC as LLAMA

SPEC = replace(LLAMA, bias_switches=MappingProxyType({}))
