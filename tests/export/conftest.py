"""Weights and models to export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from aq_lightning.export.base import Format, Subject, Weights
from aq_lightning.models.lookup import architecture_of
from aq_lightning.qtensor import QTensor, encode, grid_of
from aq_lightning.scheme import Grid, Scheme


@pytest.fixture(scope="session")
def minmax() -> Callable[[Tensor, Grid, torch.dtype], QTensor]:
    """Plain min-max quantization of a weight, its scales stored in a dtype."""

    def quantize(weight: Tensor, grid: Grid, storage: torch.dtype) -> QTensor:
        groups = weight.unflatten(1, (grid.groups(weight.shape[1]), -1))  # (out, groups, size)
        scale, zero = grid_of(groups.amin(-1), groups.amax(-1), grid, storage)
        codes = encode(groups, scale[..., None], zero[..., None], grid).flatten(1)
        return QTensor(codes.to(torch.uint8), scale.to(storage), zero.to(torch.uint8), grid)

    return quantize


@dataclass(frozen=True)
class Quantized:
    """A tiny model with quantized blocks, and all that a format is given of it."""

    model: PreTrainedModel
    """With the dequantized weights."""
    subject: Subject
    weights: Weights

    def shards(self) -> list[Weights]:
        names = list(self.weights)
        return [{name: self.weights[name] for name in part} for part in (names[:7], names[7:])]

    def write(self, form: Format, out: Path) -> Path:
        packed = (form.pack(shard, self.subject.scheme) for shard in self.shards())
        config, ignore, files = self.subject.config, self.subject.ignore, self.subject.files
        form.write(out, config, packed, self.subject.scheme, ignore=ignore, extra_files=files)
        return out


@pytest.fixture(scope="session")
def quantized(minmax: Callable[..., QTensor], tokenizer_files: list[Path]) -> Callable[..., Quantized]:
    """Makes a tiny model of a name in :mod:`tiny`, quantized by a scheme, its other tensors random in a dtype."""

    def make(name: str, scheme: str, storage: torch.dtype = torch.float16, **changes: object) -> Quantized:
        config, parsed = tiny_config(name, dtype=storage, **changes), Scheme.parse(scheme)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
            parameter.copy_(parameter.to(storage))
        prefix = architecture_of(config).blocks
        weights = {name: tensor.to(storage) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del weights["lm_head.weight"]
        for path, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            if isinstance(module, nn.Linear):
                weights[f"{path}.weight"] = packed = minmax(module.weight, parsed.weight, storage)
                module.weight.copy_(packed.dequantize(torch.float32))
        fields = {**config.to_dict(), "architectures": [type(model).__name__]}
        return Quantized(model, Subject(fields, parsed, storage, ["lm_head"], tokenizer_files), weights)

    return make


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A byte-level tokenizer of fewer tokens than the tiny models have, as transformers saves it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, initial_alphabet=list("abcdeghinorst"))
    backend.train_from_iterator(["the cat ate the hat and the rat ran to the other side again"] * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return sorted(directory.iterdir())
