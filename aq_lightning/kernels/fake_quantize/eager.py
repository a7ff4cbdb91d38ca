"""Fake quantization on a CPU, in half as many passes over the weight as autograd makes of the plain path.

The forward pass does what the plain path does, to the last bit. With :math:`u = (w / s + z)` before and :math:`\\bar u`
after the clamp, ``inside`` where both are equal, and :math:`g` what :math:`\\hat w = (\\bar u - z) s` receives,

.. math:: dw = g_{inside}, \\qquad ds = \\sum g (\\bar u - z) - \\sum g_{inside}\\, w / s, \\qquad
          dz = -s \\Big(\\sum g - \\sum g_{inside}\\Big);

what is as small as the scales is left to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aq_lightning.kernels.fake_quantize.naive import Request
from aq_lightning.qtensor import grid_of


def fake_quantize(request: Request) -> tuple[Tensor, Tensor]:
    """:func:`naive.fake_quantize` of a request without offset, in one dtype."""
    tensors = request.value, request.rows, request.columns, request.low, request.high, request.direction
    return _FewPasses.apply(request, *tensors)


class _FewPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, request: Request, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        value, rows, columns, low, high, direction = tensors
        weight = value if rows is None else value * rows[:, None]
        weight = weight if columns is None else weight * columns
        groups = weight.unflatten(1, (low.shape[1], -1))  # (out, groups, size)
        ctx.ends = [each.detach().requires_grad_() for each in (groups.amin(-1), groups.amax(-1), low, high)]
        with torch.enable_grad():
            least, greatest, low, high = ctx.ends  # (out, groups) each, as what follows
            ctx.range = grid_of(least * low, greatest * high, request.grid, request.storage)
        scale, zero = (each.detach()[..., None] for each in ctx.range)
        wished = (groups / scale).round_().add_(zero)
        codes = wished.clamp(0, request.grid.levels - 1)
        inside = wished.sub_(codes).abs_().clamp_(max=1).neg_().add_(1)  # 1 or 0: a CPU is slow with truth values
        codes.sub_(zero)
        rounded = (codes * scale).flatten(1)
        acting = None if direction is None else weight - rounded if request.rounding_only else weight
        ctx.rounding_only = request.rounding_only
        ctx.save_for_backward(value, rows, columns, direction, weight, codes, inside, acting)
        return rounded, weight.new_zeros(len(weight)) if acting is None else acting @ direction

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rounded: Tensor, d_gain: Tensor) -> tuple[Tensor | None, ...]:
        value, rows, columns, direction, weight, codes, inside, acting = ctx.saved_tensors
        received = d_rounded
        if direction is not None and ctx.rounding_only:
            received = d_rounded.addr(d_gain, direction, alpha=-1)
        received = received.reshape(codes.shape)  # (out, groups, size)
        d_weight = received * inside
        d_ends = _range_gradient(ctx, received, d_weight, weight.view_as(codes), codes)
        d_weight = d_weight.flatten(1)
        if direction is not None:
            d_weight.addr_(d_gain, direction)
        for end, gradient in zip(ctx.ends[:2], d_ends[:2], strict=True):
            at_end = (weight.view_as(codes) - end.detach()[..., None]).sign_().abs_().neg_().add_(1)  # 1 or 0
            share = gradient / at_end.sum(-1)  # of each weight that ties
            d_weight.view_as(codes).addcmul_(at_end, share[..., None])
        moved = d_weight * value if rows is not None or columns is not None else None  # (out, in)
        d_rows = None if rows is None else moved.sum(1) if columns is None else moved @ columns
        d_columns = None if columns is None else moved.sum(0) if rows is None else rows @ moved
        d_value = None
        if ctx.needs_input_grad[1]:
            d_value = d_weight if rows is None else d_weight * rows[:, None]
            d_value = d_value if columns is None else d_value * columns
        return None, d_value, d_rows, d_columns, *d_ends[2:], None if acting is None else d_gain @ acting


def _range_gradient(ctx, received: Tensor, kept: Tensor, weight: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    """Of least and greatest weights and their fractions, (out, groups) each; ``kept`` is what is received inside."""
    scale, zero = ctx.range
    scratch = received * codes
    d_scale = scratch.sum(-1)
    d_scale -= torch.mul(kept, weight, out=scratch).sum(-1) / scale.detach()
    d_zero = (kept.sum(-1) - received.sum(-1)) * scale.detach()
    trained = {scale: d_scale, zero: d_zero} if zero.requires_grad else {scale: d_scale}
    return torch.autograd.grad(list(trained), ctx.ends, list(trained.values()))
