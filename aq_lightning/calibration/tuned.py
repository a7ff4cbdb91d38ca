"""A block whose codes stay, and whose scales, norms and biases are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aq_lightning.qtensor import QTensor, decode
from aq_lightning.transforms.online import carrier


class _Decode(torch.autograd.Function):
    """``(u − z) s``; keeps nothing but the codes and zero points for the backward pass."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, zero)
        groups = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)  # (out, groups, size)
        return decode(groups, scale[..., None], zero.to(scale.dtype)[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        codes, zero = ctx.saved_tensors
        parts = gradient.unflatten(1, (zero.shape[1], -1))  # (out, groups, size), like the steps
        steps = codes.unflatten(1, (zero.shape[1], -1)).to(gradient.dtype) - zero.to(gradient.dtype)[..., None]
        return None, None, (parts * steps).sum(-1)


class TunedScales(nn.Module):
    """A quantized weight with fixed codes and scales ``s = s₀ exp(r)``, of which r is trained.

    Args:
        tensor: the weight; its scales are s₀.
    """

    def __init__(self, tensor: QTensor) -> None:
        super().__init__()
        self.grid = tensor.grid
        for name in ("codes", "zero", "scale"):
            self.register_buffer(name, getattr(tensor, name), persistent=False)
        self.ratio = nn.Parameter(torch.zeros(tensor.scale.shape))  # r, float32 (out, groups)

    def forward(self) -> Tensor:
        """The weight that the checkpoint will stand for, float32 (out, in)."""
        scale = self.scale.float() * self.ratio.exp()
        return _Decode.apply(self.codes, self.zero, _through(scale, self.stored().float()))

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The scales as a checkpoint keeps them, in its dtype; above 0."""
        kept = self.scale.dtype
        return (self.scale.float() * self.ratio.exp()).to(kept).clamp(min=torch.finfo(kept).smallest_normal)

    def tensor(self) -> QTensor:
        """The quantized weight with the trained scales."""
        return QTensor(self.codes, self.stored(), self.zero, self.grid)


class TunedBlock(nn.Module):
    """A quantized block of which scales, norms and biases are trained; every tensor is seen as it will be stored.

    Args:
        block: an HF block; the memory of its quantized weights is freed.
        tensors: all its tensors by their names in it, as a checkpoint says them.
    """

    def __init__(self, block: nn.Module, tensors: Mapping[str, QTensor | Tensor]) -> None:
        super().__init__()
        self.block = block.requires_grad_(False)
        coded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QTensor)}
        vectors = {name: tensor for name, tensor in tensors.items()
                   if isinstance(tensor, Tensor) and tensor.ndim == 1 and not carrier(name)}  # fmt: skip
        self.kept = {name: tensor.dtype for name, tensor in vectors.items()}
        self.shapes = {name: block.get_parameter(name).shape for name in coded}
        for name in coded:
            parameter = block.get_parameter(name)
            parameter.data = parameter.data.new_empty(0)
        self.scales = nn.ModuleDict({_key(name): TunedScales(tensor) for name, tensor in coded.items()})
        self.vectors = nn.ParameterDict({_key(name): nn.Parameter(tensor.float()) for name, tensor in vectors.items()})

    def forward(self, hidden: Tensor, **arguments: object) -> Tensor | tuple:
        """The block's answer, (batch, length, hidden) → the same, or what the block makes of it."""
        with torch.autocast(hidden.device.type, enabled=False):
            tensors = {name: self.scales[_key(name)]().view(shape) for name, shape in self.shapes.items()}
            for name, dtype in self.kept.items():
                vector = self.vectors[_key(name)]
                tensors[name] = _through(vector, vector.to(dtype).float())
        return functional_call(self.block, tensors, (hidden,), arguments)

    def tensors(self) -> dict[str, QTensor | Tensor]:
        """What was trained, by its names in the block, as a checkpoint says it."""
        scales = {name: self.scales[_key(name)].tensor() for name in self.shapes}
        return scales | {name: self.vectors[_key(name)].detach().to(kept) for name, kept in self.kept.items()}


def _through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``value`` (straight-through estimator)."""
    return value + (rounded - value).detach()


def _key(name: str) -> str:
    """Parameter name as a module name, which may hold no dot."""
    return name.replace(".", "/")
