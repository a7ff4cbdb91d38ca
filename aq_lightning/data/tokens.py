"""Text to tokens."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The whole text at once, without special tokens, as the papers do; int64 (tokens,)."""
    # Not verbose: that a text is longer than the model's context is the point here.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 that differs for tokenizers that differ in what they make of a text."""
    if tokenizer.is_fast:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by the tokenizer's last call, and set anew by the next.
        described = {name: value for name, value in described.items() if name not in ("truncation", "padding")}
    else:
        described = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
