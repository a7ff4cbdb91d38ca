"""Checkpoints to deploy, and what they must answer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aq_lightning.export.loading import open_model
from aq_lightning.models.lookup import architecture_of
from aq_lightning.qtensor import QTensor, encode, grid_of
from aq_lightning.quantizers import quantized as rounding
from aq_lightning.scheme import Scheme

IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 94 + 1
ONLINE = ("model.layers.0.input_layernorm", "model.layers.1.mlp.down_proj")


def quantized(model: PreTrainedModel, scheme: Scheme, storage: torch.dtype = torch.float16) -> dict[str, object]:
    """The model's tensors as a checkpoint holds them, the weights of its blocks rounded to nearest."""
    tensors = {name: tensor.to(storage) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    prefix = architecture_of(model.config).blocks
    for path, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            groups = module.weight.detach().unflatten(1, (scheme.weight.groups(module.in_features), -1))
            scale, zero = grid_of(groups.amin(-1), groups.amax(-1), scheme.weight, storage)
            codes = encode(groups, scale[..., None], zero[..., None], scheme.weight).flatten(1).to(torch.uint8)
            tensors[f"{path}.weight"] = QTensor(codes, scale.to(storage), zero.to(torch.uint8), scheme.weight)
    return tensors


@torch.no_grad()
def expected(directory: Path) -> Tensor:
    """Logits of the dequantized model in float32, its activations rounded."""
    model, _, scheme = open_model(str(directory), torch.float32)
    with rounding([model.get_submodule(architecture_of(model.config).blocks)], scheme):
        return model(IDS).logits
