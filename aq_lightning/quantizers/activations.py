"""Quantization of what enters each linear, and of keys and values where attention multiplies them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from aq_lightning.attention import Heads, attentions, hook_attention
from aq_lightning.experts import experts_of, hooked
from aq_lightning.qtensor import decode, encode, ends, grid_of
from aq_lightning.scheme import Grid, Scheme


def quantize_tokens(x: Tensor, grid: Grid) -> Tensor:
    """Fake quantization with one dynamic scale per token, computed in at least float32.

    Args:
        x: (…, channels).
        grid: bits and symmetry; no groups.

    Returns:
        (…, channels) in the dtype of ``x``; differentiable (straight through the rounding).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale, zero = grid_of(*ends(wide), grid)  # (…, 1)
    return decode(encode(wide, scale, zero, grid), scale, zero).to(x.dtype)


def quantize_cache(heads: Heads, grid: Grid) -> Heads:
    """Fake quantization of keys and values, one scale and zero point per run of a head's channels: those that come with
    them, or each token's own.

    Args:
        heads: what attention multiplies; queries stay.
        grid: bits, and the length of a run; none: a head.
    """
    size = grid.group_size or heads.key.shape[-1]
    key, value = (
        (quantize_tokens(runs, grid) if static is None else _quantize_static(runs, grid, *static)).flatten(-2)
        for runs, static in (
            (heads.key.unflatten(-1, (-1, size)), heads.key_grid),
            (heads.value.unflatten(-1, (-1, size)), heads.value_grid),
        )
    )
    return heads._replace(key=key, value=value)


def _quantize_static(x: Tensor, grid: Grid, step: Tensor, zero: Tensor) -> Tensor:
    """(batch, heads, tokens, runs, size) on grids (heads, runs), computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    step, zero = (each[:, None, :, None].to(wide.dtype) for each in (step, zero))  # (heads, 1, runs, 1)
    return decode(encode(wide, step, zero, grid), step, zero).to(x.dtype)


@contextmanager
def quantized(modules: Iterable[nn.Module], scheme: Scheme | None) -> Iterator[None]:
    """While it is open, blocks compute with the activations, keys and values of a scheme; None changes nothing.

    A cache that holds full precision is read as if it held integers: no scale depends on other tokens.
    """
    blocks = list(modules)
    with ExitStack() as hooks, quantized_activations(blocks, scheme and scheme.activation):
        for module in blocks if scheme is not None and scheme.key_value is not None else ():
            for attention in attentions(module):
                hook = hook_attention(attention, lambda heads, grid=scheme.key_value: quantize_cache(heads, grid))
                hooks.callback(hook.remove)
        yield


@contextmanager
def quantized_activations(modules: Iterable[nn.Module], grid: Grid | None) -> Iterator[None]:
    """While it is open, every linear inside ``modules`` sees its input quantized; None changes nothing.

    The linears of experts do too; a router, which decides in full precision, does not.
    """
    with ExitStack() as hooks:
        for module in modules if grid is not None else ():
            linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
            for reader in linears + experts_of(module):
                handle = reader.register_forward_pre_hook(
                    lambda _, inputs, grid=grid: (quantize_tokens(inputs[0], grid), *inputs[1:])
                )
                hooks.callback(handle.remove)
            for experts in experts_of(module):
                hooks.enter_context(hooked(experts, lambda _, inner, grid=grid: quantize_tokens(inner, grid)))
        yield
