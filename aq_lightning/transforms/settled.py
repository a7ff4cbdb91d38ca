"""Small tensors that are computed once, however many weights they multiply."""

from __future__ import annotations

import torch
from torch import Tensor


def settled(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, computed where it stands; differentiable.

    A compiler cannot move what is inside. It would otherwise compute a channel's exponential or cosine anew, in
    float64, for each weight that the channel multiplies.
    """
    return _settled(tensor, dtype)


@torch.library.custom_op("aq_lightning::settled", mutates_args=())
def _settled(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


@_settled.register_fake
def _(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient.to(ctx.dtype), None


_settled.register_autograd(_backward, setup_context=_keep)
