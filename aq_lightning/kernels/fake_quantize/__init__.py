"""Fake quantization of weights with gradients, as one operator that torch.compile and CUDA graphs keep."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.fake_quantize import eager, naive
from aq_lightning.kernels.fake_quantize.naive import Request as Request
from aq_lightning.scheme import Grid


def fake_quantize(request: Request) -> tuple[Tensor, Tensor]:
    """:func:`naive.fake_quantize`, differentiable, on a GPU by a kernel, on a CPU in few passes.

    Both compute in float32, so they answer float32 requests; others take the plain path.
    """
    if request.low.dtype == torch.float32 and request.value.device.type == "cuda":
        return fused(request)
    float32 = request.value.dtype == request.low.dtype == request.dtype == torch.float32
    if float32 and request.offset is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return eager.fake_quantize(request)
    return naive.fake_quantize(request)


def fused(request: Request) -> tuple[Tensor, Tensor]:
    """:func:`fake_quantize` by the kernel, whatever the device."""
    *tensors, grid, storage, rounding_only, dtype = request
    tensors = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]  # as the kernel walks them
    storage = storage or torch.float32
    rounded, gain, _ = _operator(*tensors, grid.bits, grid.symmetric, storage, rounding_only, dtype)
    return rounded, gain


@torch.library.custom_op("aq_lightning::fake_quantize", mutates_args=())
def _operator(
    value: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    low: Tensor,
    high: Tensor,
    direction: Tensor | None,
    offset: Tensor | None,
    bits: int,
    symmetric: bool,
    storage: torch.dtype,
    rounding_only: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from aq_lightning.kernels.fake_quantize.forward import forward

    grid = Grid(bits, symmetric=symmetric)
    return forward(Request(value, rows, columns, low, high, direction, offset, grid, storage, rounding_only, dtype))


@_operator.register_fake
def _(value, rows, columns, low, high, direction, offset, bits, symmetric, storage, rounding_only, dtype):
    return value.new_empty(value.shape, dtype=dtype), low.new_empty(value.shape[0]), low.new_empty((*low.shape, 4))


@torch.library.custom_op("aq_lightning::fake_quantize_backward", mutates_args=())
def _backward_operator(
    d_rounded: Tensor,
    d_gain: Tensor,
    found: Tensor,
    value: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    low: Tensor,
    high: Tensor,
    direction: Tensor | None,
    offset: Tensor | None,
    bits: int,
    symmetric: bool,
    storage: torch.dtype,
    rounding_only: bool,
    needs_value: bool,
) -> list[Tensor]:
    from aq_lightning.kernels.fake_quantize.backward import backward

    grid = Grid(bits, symmetric=symmetric)
    request = Request(value, rows, columns, low, high, direction, offset, grid, storage, rounding_only, d_rounded.dtype)
    return backward(request, found, d_rounded, d_gain, needs_value)


@_backward_operator.register_fake
def _(
    d_rounded,
    d_gain,
    found,
    value,
    rows,
    columns,
    low,
    high,
    direction,
    offset,
    bits,
    symmetric,
    storage,
    rounding_only,
    needs,
):
    def like(tensor: Tensor | None) -> Tensor:
        return low.new_empty((0,) if tensor is None else tensor.shape)

    value = value if needs else None
    return [like(tensor) for tensor in (value, rows, columns, low, high, direction, offset)]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.bits, ctx.symmetric, ctx.storage, ctx.rounding_only, _ = inputs
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, d_rounded: Tensor, d_gain: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (found, *tensors), needs_value = ctx.saved_tensors, ctx.needs_input_grad[0]
    gradients = _backward_operator(
        d_rounded, d_gain, found, *tensors, ctx.bits, ctx.symmetric, ctx.storage, ctx.rounding_only, needs_value
    )
    wanted = zip(gradients, tensors, ctx.needs_input_grad[:7], strict=True)
    return *(gradient.to(tensor.dtype) if needed else None for gradient, tensor, needed in wanted), *[None] * 5


_operator.register_autograd(_backward, setup_context=_keep)
