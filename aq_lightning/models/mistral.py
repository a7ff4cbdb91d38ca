"""Mistral: LLaMA's sites, sliding-window attention, no biases anywhere."""

from __future__ import annotations

from aq_lightning.models.llama import SPEC as LLAMA
from aq_lightning.models.sites import Architecture

SPEC = Architecture(blocks=LLAMA.blocks, sites=LLAMA.sites, attention=LLAMA.attention)
