"""Checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deployed import ONLINE, quantized
from helpers import tiny_llama, word_tokenizer
from transformers import PreTrainedModel

from aq_lightning.export.compressed_tensors import write
from aq_lightning.scheme import Scheme


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny model quantized by a scheme, with its tokenizer; ``online``: with products on two modules."""

    def make(name: str, model: PreTrainedModel | None = None, online: bool = False, **options: object) -> Path:
        model, scheme = model or tiny_llama(), Scheme.parse(name)
        tensors = quantized(model, scheme, options.pop("storage", torch.float16))
        for path in ONLINE if online else ():
            width = 128 if path.endswith("down_proj") else 64
            blocks = torch.eye(width // 2) + 0.05 * torch.randn(2, width // 2, width // 2)
            tensors[f"{path}.online.0.inverse"] = blocks.half()
        fields = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float16"}
        out, names, files = tmp_path / name, list(tensors), options.pop("files", 1)
        shards = [{key: tensors[key] for key in names[first::files]} for first in range(files)]
        write(out, fields, shards, scheme, **options)
        word_tokenizer().save_pretrained(out)
        return out

    return make
