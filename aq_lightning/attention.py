"""Attention whose queries, keys and values can be changed behind rotary embedding, where they are multiplied.

transformers lets a configuration name the function that multiplies them. A module that carries hooks gets a copy of its
configuration that names ours: it calls the hooks, then the function that the module would have called. What keys
and values become there is what a cache of that kind would hold: hooks that act on each token alone may run when tokens
are written or when they are read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from typing import NamedTuple

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _ALL

from aq_lightning.errors import RequestError


class Heads(NamedTuple):
    """What attention multiplies, in heads."""

    query: Tensor
    """(batch, query heads, tokens, size)."""
    key: Tensor
    """(batch, key-value heads, tokens, size)."""
    value: Tensor
    """As ``key``."""
    key_grid: tuple[Tensor, Tensor] | None = None
    """Steps and zero points with which keys are rounded, (key-value heads, runs) each; None: each token has its own."""
    value_grid: tuple[Tensor, Tensor] | None = None
    """As ``key_grid``."""


Hook = Callable[[Heads], Heads]
Function = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query, key, value, mask, …) → (batch, tokens, query heads, size), and weights or None."""

_NAME = "aq_lightning"
_KINDS = ("eager", "sdpa")


class Handle:
    """Takes a hook away again."""

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self._module, self._hook = module, hook

    def remove(self) -> None:
        """Leaves the module as it was before."""
        module = self._module
        module.attention_hooks = [hook for hook in module.attention_hooks if hook is not self._hook]
        if not module.attention_hooks and module.instead_of_sdpa is None:
            module.config = module.plain_config


def hook_attention(module: nn.Module, hook: Hook, prepend: bool = False) -> Handle:
    """Makes an attention module call ``hook`` each time, before or behind those that it has.

    Raises:
        RequestError: attention runs by a function that is not known here.
    """
    if _kind(module) not in _KINDS:
        raise RequestError(
            f"Queries and keys are seen in {' and '.join(_KINDS)} attention, got {_kind(module)!r}: load the model "
            "with one of these."
        )
    _redirect(module)
    hooks = module.attention_hooks
    module.attention_hooks = [hook, *hooks] if prepend else [*hooks, hook]
    return Handle(module, hook)


def replace_sdpa(module: nn.Module, function: Function) -> None:
    """Makes an attention module multiply by ``function`` wherever its model's configuration asks for PyTorch's, behind
    the hooks it has; one that does not look its function up by name stays."""
    code = getattr(type(module).forward, "__code__", None)
    if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
        _redirect(module)
        module.instead_of_sdpa = function


def sdpa() -> Function:
    """What multiplies by PyTorch's ``scaled_dot_product_attention``."""
    return _ALL["sdpa"]


def attentions(module: nn.Module) -> list[nn.Module]:
    """The modules that run by the attention function that their configuration names."""
    return [part for part in module.modules() if type(part).__name__.endswith("Attention") and "config" in vars(part)]


def _redirect(module: nn.Module) -> None:
    """Makes the module call :func:`_attend`, if it does not."""
    if module.config._attn_implementation != _NAME:
        module.attention_hooks, module.instead_of_sdpa = [], None
        module.plain_config, module.config = module.config, copy(module.config)
        module.config._attn_implementation = _NAME


def _kind(module: nn.Module) -> str:
    """The function that its model's configuration names now."""
    redirected = module.config._attn_implementation == _NAME
    return (module.plain_config if redirected else module.config)._attn_implementation or "eager"


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: object, **named: object):
    heads = Heads(query, key, value)
    for hook in module.attention_hooks:
        heads = hook(heads)
    kind = _kind(module)
    if kind == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = module.instead_of_sdpa if kind == "sdpa" and module.instead_of_sdpa is not None else _ALL[kind]
    return function(module, heads.query, heads.key, heads.value, *others, **named)


_ALL.register(_NAME, _attend)
