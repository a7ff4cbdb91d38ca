"""Norms and gates in one pass over memory each.

transformers writes them in operations of PyTorch, of which each reads and writes all tokens: seven for a norm, two for
a gate. A compiler joins them, but prompts are read as the model is written. What is replaced answers as before, but for
roundings in between that are left out.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from aq_lightning.kernels.gated_silu import gated_silu

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) · up(x))``, by the layers of another.

    Args:
        mlp: whose layers these are.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) → the same."""
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


def join_elementwise(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces, in place, norms and gated MLPs that are written as LLaMA's; what is written otherwise or carries hooks
    stays."""
    for path, module in list(model.named_modules()):
        if _written_as(module, LlamaRMSNorm.forward):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, device="meta")
            norm.weight = module.weight
            model.set_submodule(path, norm.train(module.training))
        elif _written_as(module, LlamaMLP.forward) and isinstance(module.act_fn, _SILU):
            model.set_submodule(path, GatedMLP(module))
    return model


def _written_as(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether calling a module runs the instructions of a function and nothing else."""
    own = getattr(type(module).forward, "__code__", None)
    known = forward.__code__
    alike = own is not None and all(
        getattr(own, part) == getattr(known, part) for part in ("co_code", "co_names", "co_consts")
    )
    return alike and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
