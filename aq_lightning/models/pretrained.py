"""A pretrained model of which no more is in memory than what is at work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aq_lightning.errors import RequestError
from aq_lightning.models.files import check_finite
from aq_lightning.models.lookup import heads_of
from aq_lightning.models.naming import renamed
from aq_lightning.models.sites import Architecture, Heads
from aq_lightning.models.weights import Weights

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    location: str
    """Directory or hub id, as transformers takes it."""
    gguf_file: str | None = None
    """Name of the GGUF file in the directory, if it is one."""

    @property
    def options(self) -> dict[str, str]:
        """Keyword arguments of ``from_pretrained``."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


@dataclass(frozen=True)
class Pretrained:
    """A causal language model: what it is, and its weights when asked for."""

    source: Source
    model: PreTrainedModel
    """Without weights (on the meta device), if :attr:`weights` reads them; or with them, on the CPU, in the storage
    dtype. Nothing changes it."""
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    weights: Weights | None = None
    """Where the weights are read from; None: the model holds them."""
    whole: str = ""
    """Why the model holds its weights."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks in order, to look at; :meth:`block` is one to work with."""
        return self.model.get_submodule(self.architecture.blocks)

    @property
    def heads(self) -> Heads:
        """Attention heads of a block."""
        return heads_of(self.model.config, self.architecture)

    def block(self, index: int) -> nn.Module:
        """A block with its weights, on the CPU in the storage dtype; a new one at each call.

        Raises:
            RequestError: see :func:`filled`.
        """
        config = self.model.config
        block = deepcopy(self.blocks[index], {id(config): config})
        return block if self.weights is None else filled(block, self.weights.block(index), self.source)

    def window(self, indices: Iterable[int]) -> dict[int, nn.Module]:
        """Several blocks by index, each as :meth:`block` reads it."""
        return {index: self.block(index) for index in indices}

    def shell(self) -> PreTrainedModel:
        """The model with its weights outside the blocks, in the storage dtype; the blocks are hollow. A new one at each
        call."""
        config = self.model.config
        kept = {id(tensor): tensor for tensor in [*self.blocks.parameters(), *self.blocks.buffers(), config]}
        shell = deepcopy(self.model, kept)
        for block in shell.get_submodule(self.architecture.blocks):
            for parts in (block._modules, block._parameters, block._buffers):
                parts.clear()
        if self.weights is not None:
            filled(shell, self.weights.outside(), self.source).tie_weights()
        return shell

    def unquantized(self) -> list[str]:
        """Linears in full precision, as checkpoints name them: the output head, and the routers of experts."""
        inside = {module for block in self.blocks for module in block.modules()}
        heads = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module not in inside
        ]
        readers = [name for site in self.architecture.sites for name in site.consumers]
        routers = [
            renamed(f"{self.architecture.blocks}.{index}.{name}", self.architecture)
            for index, block in enumerate(self.blocks)
            for name in readers
            if name not in self.architecture.experts and not isinstance(block.get_submodule(name), nn.Linear)
        ]
        return heads + routers

    def outside(self) -> dict[str, Tensor]:
        """Tensors outside the blocks by name, in the storage dtype; of tied ones the first."""
        shell = self.shell()
        kept = {name for name, _ in shell.named_parameters()} | {name for name, _ in shell.named_buffers()}
        return {
            name: tensor.to(self.storage) if tensor.is_floating_point() else tensor
            for name, tensor in shell.state_dict().items()
            if name in kept
        }

    def config(self) -> dict[str, object]:
        """Content of ``config.json``, without the path that the model was read from."""
        fields = {
            k: v for k, v in self.model.config.to_dict().items() if k not in ("_name_or_path", "_model_name_or_path")
        }
        return {**fields, "architectures": [type(self.model).__name__]}

    @property
    def storage(self) -> torch.dtype:
        """Dtype of the checkpoint's tensors that are not integers."""
        return self.model.config.dtype


def filled(module: Module, tensors: Mapping[str, Tensor], source: Source) -> Module:
    """The module, with tensors in place of its own.

    Raises:
        RequestError: one has another shape, or see :func:`check_finite`.
    """
    own = module.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise RequestError(
                f"config.json describes the weights beside it, got {tuple(own[name].shape)} for {name}, which has the "
                f"shape {tuple(tensor.shape)} in {source.location!r}: mend config.json, or download the model again."
            )
    check_finite(tensors, source.location)
    module.load_state_dict(tensors, strict=False, assign=True)
    return module
