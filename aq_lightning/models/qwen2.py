"""Qwen 1.5, 2 and 2.5: LLaMA's sites; q, k and v always have biases, the other linears never."""

from __future__ import annotations

from aq_lightning.models.llama import SPEC as LLAMA
from aq_lightning.models.sites import Architecture

SPEC = Architecture(blocks=LLAMA.blocks, sites=LLAMA.sites, attention=LLAMA.attention)
