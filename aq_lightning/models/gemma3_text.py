"""Gemma 3, text only: Gemma 2 with normalized queries and keys."""

from __future__ import annotations

from dataclasses import replace

from aq_lightning.models.gemma2 import MLP_INPUT
from aq_lightning.models.gemma2 import SPEC as GEMMA2
from aq_lightning.models.llama import ATTENTION_INPUT, MLP_HIDDEN, VALUE_OUTPUT
from aq_lightning.models.qwen3 import QUERY_KEY

SPEC = replace(GEMMA2, sites=(ATTENTION_INPUT, QUERY_KEY, VALUE_OUTPUT, MLP_INPUT, MLP_HIDDEN))
