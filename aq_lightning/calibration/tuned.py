"""A quantized block whose scales, norms and biases are trained, and its codes if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aq_lightning.qtensor import QTensor, decode, round_through
from aq_lightning.transforms.online import carrier

_REACH = 0.4995  # of an offset that moves no code: below a tie, also once codes are added in float32


class _Decode(torch.autograd.Function):
    """``(u − z) s``; keeps nothing but these three for the backward pass, the codes in the dtype given."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, zero, scale)
        groups = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)  # (out, groups, size)
        return decode(groups, scale[..., None], zero.to(scale.dtype)[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor]:
        codes, zero, scale = ctx.saved_tensors
        parts = gradient.unflatten(1, (zero.shape[1], -1))  # (out, groups, size), like the steps
        steps = codes.unflatten(1, (zero.shape[1], -1)).to(gradient.dtype) - zero.to(gradient.dtype)[..., None]
        moved = (parts * scale[..., None]).flatten(1) if ctx.needs_input_grad[0] else None
        return moved, None, (parts * steps).sum(-1)


class TunedWeight(nn.Module):
    """A quantized weight with scales ``s = s₀ exp(r)``, of which r is trained, and codes ``u = round(u₀ + o)``, of
    which o is, through the rounding.

    Offsets o begin anywhere between two ties, so that codes which all have reason to move do so one after the other,
    and each sees what those before it have changed.

    Args:
        tensor: the weight; its scales are s₀ and its codes u₀.
        drawn: where the first offsets come from; None: codes stay.
    """

    def __init__(self, tensor: QTensor, drawn: torch.Generator | None = None) -> None:
        super().__init__()
        self.grid = tensor.grid
        for name in ("codes", "zero", "scale"):
            self.register_buffer(name, getattr(tensor, name), persistent=False)
        self.ratio = nn.Parameter(torch.zeros(tensor.scale.shape))  # r, float32 (out, groups)
        first = None if drawn is None else _REACH * (2 * torch.rand(tensor.codes.shape, generator=drawn) - 1)
        self.offset = None if first is None else nn.Parameter(first)  # o, float32 (out, in)

    def forward(self) -> Tensor:
        """The weight that the checkpoint will stand for, float32 (out, in)."""
        scale = self.scale.float() * self.ratio.exp()
        return _Decode.apply(self.moved(), self.zero, _through(scale, self.stored().float()))

    def moved(self) -> Tensor:
        """The codes, (out, in): as they were, or float32 with the gradient of what was added to them."""
        if self.offset is None:
            return self.codes
        return round_through(self.codes + self.offset)

    @torch.no_grad()
    def project(self) -> None:
        """Brings offsets that would leave the grid back to its ends, from where they may return."""
        if self.offset is not None:
            first = self.codes.float()  # u₀
            self.offset.clamp_(-_REACH - first, self.grid.levels - 1 + _REACH - first)

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The scales as a checkpoint keeps them, in its dtype; above 0."""
        kept = self.scale.dtype
        return (self.scale.float() * self.ratio.exp()).to(kept).clamp(min=torch.finfo(kept).smallest_normal)

    def tensor(self) -> QTensor:
        """The quantized weight with what was trained."""
        return QTensor(self.moved().detach().to(self.codes.dtype), self.stored(), self.zero, self.grid)


class TunedBlock(nn.Module):
    """A quantized block of which scales, norms and biases are trained; every tensor is seen as it will be stored.

    Args:
        block: an HF block; the memory of its quantized weights is freed.
        tensors: all its tensors by their names in it, as a checkpoint says them.
        drawn: where the first offsets of codes come from; None: codes stay.
    """

    def __init__(
        self, block: nn.Module, tensors: Mapping[str, QTensor | Tensor], drawn: torch.Generator | None = None
    ) -> None:
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
        self.weights = nn.ModuleDict({_key(name): TunedWeight(tensor, drawn) for name, tensor in coded.items()})
        self.vectors = nn.ParameterDict({_key(name): nn.Parameter(tensor.float()) for name, tensor in vectors.items()})

    def forward(self, hidden: Tensor, **arguments: object) -> Tensor | tuple:
        """The block's answer, (batch, length, hidden) → the same, or what the block makes of it."""
        with torch.autocast(hidden.device.type, enabled=False):
            tensors = {name: self.weights[_key(name)]().view(shape) for name, shape in self.shapes.items()}
            for name, dtype in self.kept.items():
                vector = self.vectors[_key(name)]
                tensors[name] = _through(vector, vector.to(dtype).float())
        return functional_call(self.block, tensors, (hidden,), arguments)

    def tensors(self) -> dict[str, QTensor | Tensor]:
        """What was trained, by its names in the block, as a checkpoint says it."""
        coded = {name: self.weights[_key(name)].tensor() for name in self.shapes}
        return coded | {name: self.vectors[_key(name)].detach().to(kept) for name, kept in self.kept.items()}


def _through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``value`` (straight-through estimator)."""
    return value + (rounded - value).detach()


def _key(name: str) -> str:
    """Parameter name as a module name, which may hold no dot."""
    return name.replace(".", "/")
