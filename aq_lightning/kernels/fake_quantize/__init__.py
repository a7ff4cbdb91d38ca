"""Fake quantization of weights with gradients, as one operator that torch.compile and CUDA graphs keep."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.kernels.fake_quantize import naive
from aq_lightning.scheme import Grid


def fake_quantize(
    value: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    low: Tensor,
    high: Tensor,
    direction: Tensor | None,
    grid: Grid,
    storage: torch.dtype,
    rounding_only: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """:func:`naive.fake_quantize`, by a Triton kernel where there is one for the device; differentiable.

    The kernel computes in float32, so it answers float32 requests; others take the plain path.
    """
    if low.dtype != torch.float32 or value.device.type != "cuda":
        return naive.fake_quantize(value, rows, columns, low, high, direction, grid, storage, rounding_only, dtype)
    return _operator(
        value, rows, columns, low, high, direction, grid.levels, grid.symmetric, storage, rounding_only, dtype
    )


@torch.library.custom_op("aq_lightning::fake_quantize", mutates_args=())
def _operator(
    value: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    low: Tensor,
    high: Tensor,
    direction: Tensor | None,
    levels: int,
    symmetric: bool,
    storage: torch.dtype,
    rounding_only: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from aq_lightning.kernels.fake_quantize import triton

    return triton.forward(value, rows, columns, low, high, direction, levels, symmetric, storage, rounding_only, dtype)


@_operator.register_fake
def _(value, rows, columns, low, high, direction, levels, symmetric, storage, rounding_only, dtype):
    return value.new_empty(value.shape, dtype=dtype), low.new_empty(value.shape[0])


@torch.library.custom_op("aq_lightning::fake_quantize_backward", mutates_args=())
def _backward_operator(
    d_rounded: Tensor,
    d_gain: Tensor,
    value: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    low: Tensor,
    high: Tensor,
    direction: Tensor | None,
    levels: int,
    symmetric: bool,
    storage: torch.dtype,
    rounding_only: bool,
    needs_value: bool,
) -> list[Tensor]:
    from aq_lightning.kernels.fake_quantize import triton

    return list(
        triton.backward(
            d_rounded, d_gain, value, rows, columns, low, high, direction,
            levels, symmetric, storage, rounding_only, needs_value,
        )
    )  # fmt: skip


@_backward_operator.register_fake
def _(d_rounded, d_gain, value, rows, columns, low, high, direction, levels, symmetric, storage, rounding_only, needs):
    def like(tensor: Tensor | None, there: bool = True) -> Tensor:
        return low.new_empty(tensor.shape if tensor is not None and there else (0,))

    return [like(value, needs), like(rows), like(columns), like(low), like(high), like(direction)]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.levels, ctx.symmetric, ctx.storage, ctx.rounding_only, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.needs_value = inputs[0].requires_grad


def _backward(ctx, d_rounded: Tensor, d_gain: Tensor):
    tensors = ctx.saved_tensors
    gradients = _backward_operator(
        d_rounded, d_gain, *tensors, ctx.levels, ctx.symmetric, ctx.storage, ctx.rounding_only, ctx.needs_value
    )
    there = [ctx.needs_value, *(tensor is not None for tensor in tensors[1:])]
    kept = [gradient if wanted else None for gradient, wanted in zip(gradients, there, strict=True)]
    if ctx.needs_value:
        kept[0] = kept[0].to(tensors[0].dtype)
    return (*kept, *[None] * 5)


_operator.register_autograd(_backward, setup_context=_keep)
