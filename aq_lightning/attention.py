"""Attention whose queries, keys and values can be changed behind rotary embedding, where they are multiplied.

transformers lets a configuration name the function that multiplies them. A module that carries hooks gets a copy of its
configuration that names one of ours: it calls the hooks, then the function that the module would have called. What keys
and values become there is what a cache of that kind would hold: hooks that act on each token alone may run when tokens
are written or when they are read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from typing import NamedTuple

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aq_lightning.errors import RequestError


class Heads(NamedTuple):
    """What attention multiplies, in heads."""

    query: Tensor
    """(batch, query heads, tokens, size)."""
    key: Tensor
    """(batch, key-value heads, tokens, size)."""
    value: Tensor
    """As ``key``."""


Hook = Callable[[Heads], Heads]

_PREFIX = "aq_lightning_"
_KINDS = ("eager", "sdpa")


class Handle:
    """Takes a hook away again."""

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self._module, self._hook = module, hook

    def remove(self) -> None:
        """Leaves the module as it was before."""
        hooks = [hook for hook in self._module.attention_hooks if hook is not self._hook]
        self._module.attention_hooks = hooks
        if not hooks:
            name = self._module.config._attn_implementation.removeprefix(_PREFIX)
            self._module.config = _named(self._module.config, name)


def hook_attention(module: nn.Module, hook: Hook, prepend: bool = False) -> Handle:
    """Makes an attention module call ``hook`` each time, before or behind those that it has.

    Raises:
        RequestError: attention runs by a function that is not known here.
    """
    hooks = vars(module).get("attention_hooks", [])
    module.attention_hooks = [hook, *hooks] if prepend else [*hooks, hook]
    name = module.config._attn_implementation or "eager"
    if not hooks:
        if name not in _KINDS:
            raise RequestError(
                f"Queries and keys are seen in {' and '.join(_KINDS)} attention, got {name!r}: load the model with one "
                "of these."
            )
        module.config = _named(module.config, f"{_PREFIX}{name}")
    return Handle(module, hook)


def attentions(module: nn.Module) -> list[nn.Module]:
    """The modules that run by the attention function that their configuration names."""
    return [part for part in module.modules() if type(part).__name__.endswith("Attention") and "config" in vars(part)]


def _named(config: object, implementation: str) -> object:
    config = copy(config)
    config._attn_implementation = implementation
    return config


def _function(kind: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: object, **named: object):
        heads = Heads(query, key, value)
        for hook in module.attention_hooks:
            heads = hook(heads)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        function = eager if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        return function(module, *heads, *others, **named)

    return attend


for _kind in _KINDS:
    ALL_ATTENTION_FUNCTIONS.register(f"{_PREFIX}{_kind}", _function(_kind))
