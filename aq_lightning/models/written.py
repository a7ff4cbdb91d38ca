"""Modules whose code is known by its instructions, whatever architecture they belong to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

_SILU = (nn.SiLU, type(ACT2FN["silu"]))
_ROTARY = "apply_rotary_pos_emb"  # by this name of its file an attention calls it

Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Queries (batch, heads, tokens, size), keys, cosines (batch or 1, tokens, size) and sines → queries and keys."""


def is_rms_norm(module: nn.Module) -> bool:
    """Whether it computes ``w x / √(mean(x²) + ε)`` of ``weight`` and ``variance_epsilon``, and calling it does nothing
    else."""
    return _written_as(module, LlamaRMSNorm.forward)


def is_gated_silu(module: nn.Module) -> bool:
    """Whether it computes ``down(silu(gate(x)) · up(x))`` of ``gate_proj``, ``up_proj`` and ``down_proj``, and calling
    it does nothing else."""
    return _written_as(module, LlamaMLP.forward) and isinstance(module.act_fn, _SILU) and not _hooked(module.act_fn)


def embeds_by_halves(module: nn.Module) -> bool:
    """Whether it calls a function of its file that computes ``x · cos + rotate_half(x) · sin`` of queries and keys, for
    halves of the last dimension."""
    return not _overridden(module) and _embeds_by_halves(type(module))


def embed_by(module: nn.Module, rotary: Rotary) -> None:
    """Makes a module of which :func:`embeds_by_halves` holds call ``rotary`` instead; all else stays as it is written.

    Its class becomes one derived from its own, of the same name. Copies and pickles of the module keep it.

    Args:
        module: changed in place.
        rotary: a function at the top of its file, so that pickles can name it.
    """
    module.__class__ = _embedding_by(type(module), type(module).forward, rotary)


@cache
def _embedding_by(kind: type[nn.Module], forward: FunctionType, rotary: Rotary) -> type[nn.Module]:
    """The class whose forward calls ``rotary``: one for all modules of a kind, so that they share what is compiled."""
    written = forward.__globals__[_ROTARY]

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1:
            return written(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos, sin)

    names = {**forward.__globals__, _ROTARY: apply}
    names.pop("__name__", None)  # by which torch.compile would look names up in the file instead
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__, own.__annotations__ = forward.__kwdefaults__, forward.__annotations__

    def reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _empty, (kind, rotary), *kind.__reduce_ex__(module, protocol)[2:]

    members = {"forward": own, "__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)


def _empty(kind: type[nn.Module], rotary: Rotary) -> nn.Module:
    """A module without its state, which copies and pickles fill."""
    kind = _embedding_by(kind, kind.forward, rotary) if _embeds_by_halves(kind) else kind
    return kind.__new__(kind)


def _embeds_by_halves(kind: type[nn.Module]) -> bool:
    forward = kind.forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    own, known = _function(forward.__globals__.get(_ROTARY)), _function(modeling_llama.apply_rotary_pos_emb)
    return _alike(own, known) and _alike(own.__globals__.get("rotate_half"), modeling_llama.rotate_half)


def _function(called: Any) -> FunctionType | None:
    """What runs when it is called: itself, or what the package ``kernels`` made a module of."""
    if isinstance(called, nn.Module) and not _hooked(called):
        cells = getattr(type(called).forward, "__closure__", None) or ()
        inside = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, FunctionType)]
        return inside[0] if len(inside) == 1 else None
    return called if isinstance(called, FunctionType) else None


def _written_as(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether calling a module runs the instructions of a function and nothing else."""
    return _alike(type(module).forward, forward) and not _hooked(module)


def _alike(own: Any, known: Any) -> bool:
    """Whether two functions have the same instructions, constants and defaults, whatever their docstrings say."""
    if not isinstance(own, FunctionType) or not isinstance(known, FunctionType):
        return False
    return _instructions(own) == _instructions(known)


def _instructions(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    constants = [constant for constant in code.co_consts if constant != function.__doc__]
    return code.co_code, code.co_names, constants, function.__defaults__, function.__kwdefaults__


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or _overridden(module)


def _overridden(module: nn.Module) -> bool:
    """Whether calling a module runs another function than that of its class."""
    return "forward" in vars(module)
