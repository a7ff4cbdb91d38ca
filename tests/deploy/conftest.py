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


def products(width: int, kronecker: bool) -> dict[str, torch.Tensor]:
    """A product in blocks; or a Kronecker product and a clip."""

    def near(*shape: int) -> torch.Tensor:
        return torch.eye(shape[-1]) + 0.05 * torch.randn(*shape, shape[-1])

    if kronecker:
        return {"0.left": near(width // 8), "0.right": near(8), "1.clip": torch.tensor([0.9, 0.8])}
    return {"0.inverse": near(2, width // 2)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny model quantized by a scheme, with its tokenizer; ``online``: with products on two modules, of a
    kind."""

    def make(name: str, model: PreTrainedModel | None = None, online: object = False, **options: object) -> Path:
        model, scheme = model or tiny_llama(), Scheme.parse(name)
        tensors = quantized(model, scheme, options.pop("storage", torch.float16))
        for path in ONLINE if online else ():
            for tensor, value in products(128 if path.endswith("down_proj") else 64, online == "kronecker").items():
                tensors[f"{path}.online.{tensor}"] = value.half()
        fields = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float16"}
        out, names, files = tmp_path / name, list(tensors), options.pop("files", 1)
        shards = [{key: tensors[key] for key in names[first::files]} for first in range(files)]
        write(out, fields, shards, scheme, **options)
        word_tokenizer().save_pretrained(out)
        return out

    return make
