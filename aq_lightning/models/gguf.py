"""How GGUF files name and arrange the models that are written to them: data only.

Facts are those of llama.cpp's loader: the tensors that its graph of an architecture reads, and the order of their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

TENSORS: Mapping[str, str] = MappingProxyType(
    {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.*.input_layernorm": "blk.*.attn_norm",
        "model.layers.*.self_attn.q_proj": "blk.*.attn_q",
        "model.layers.*.self_attn.k_proj": "blk.*.attn_k",
        "model.layers.*.self_attn.v_proj": "blk.*.attn_v",
        "model.layers.*.self_attn.o_proj": "blk.*.attn_output",
        "model.layers.*.self_attn.q_norm": "blk.*.attn_q_norm",
        "model.layers.*.self_attn.k_norm": "blk.*.attn_k_norm",
        "model.layers.*.post_attention_layernorm": "blk.*.ffn_norm",
        "model.layers.*.mlp.gate_proj": "blk.*.ffn_gate",
        "model.layers.*.mlp.up_proj": "blk.*.ffn_up",
        "model.layers.*.mlp.down_proj": "blk.*.ffn_down",
    }
)
"""Module in transformers → name in GGUF, ``*`` being the block's number; ``.weight`` and ``.bias`` follow both."""


@dataclass(frozen=True)
class GgufArchitecture:
    """One model type."""

    name: str
    """``general.architecture``."""
    permuted: tuple[str, ...] = ()
    """Ends of the modules whose rows lie as rotary pairs side by side, instead of half a head apart: q, then k."""
    switches: tuple[str, ...] = ()
    """Configuration's switches of biases that the graph reads."""


_PAIRS = ("self_attn.q_proj", "self_attn.k_proj")
ARCHITECTURES: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        "llama": GgufArchitecture("llama", _PAIRS, ("attention_bias", "mlp_bias")),
        "mistral": GgufArchitecture("llama", _PAIRS),
        "qwen2": GgufArchitecture("qwen2"),
        "qwen3": GgufArchitecture("qwen3"),
    }
)
"""Model type → its architecture; those that are tested."""

FILE_TYPES: Mapping[str, int] = MappingProxyType({"Q4_0": 2, "Q4_1": 3, "Q8_0": 7})
"""Kind of most blocks → ``general.file_type``."""
