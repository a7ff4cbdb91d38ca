"""Modules whose code is known by its instructions, whatever architecture they belong to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def is_rms_norm(module: nn.Module) -> bool:
    """Whether it computes ``w x / √(mean(x²) + ε)`` of ``weight`` and ``variance_epsilon``, and calling it does nothing
    else."""
    return _written_as(module, LlamaRMSNorm.forward)


def is_gated_silu(module: nn.Module) -> bool:
    """Whether it computes ``down(silu(gate(x)) · up(x))`` of ``gate_proj``, ``up_proj`` and ``down_proj``, and calling
    it does nothing else."""
    return _written_as(module, LlamaMLP.forward) and isinstance(module.act_fn, _SILU) and not _hooked(module.act_fn)


def _written_as(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether calling a module runs the instructions of a function and nothing else."""
    own, known = getattr(type(module).forward, "__code__", None), forward.__code__
    parts = ("co_code", "co_names", "co_consts")
    alike = own is not None and all(getattr(own, part) == getattr(known, part) for part in parts)
    return alike and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
