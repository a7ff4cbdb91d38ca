"""Norms, gates and rotary embeddings in one pass over memory each.

transformers writes them in operations of PyTorch, most of which read and write all tokens: eight for a norm, two for
a gate, ten for a rotary embedding. A compiler joins them, but prompts are read as the model is written. What is
replaced answers as before, but for roundings in between that are left out.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from aq_lightning.kernels.gated_silu import gated_silu
from aq_lightning.kernels.rms_norm import rms_norm
from aq_lightning.kernels.rotary import rotary
from aq_lightning.models.written import embed_by, embeds_by_halves, is_gated_silu, is_rms_norm


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


class RMSNorm(nn.Module):
    """``w x / √(mean(x²) + ε)`` of another's weight.

    Args:
        norm: whose weight and ε these are.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → the same."""
        return rms_norm(x, self.weight, self.variance_epsilon)


def join_elementwise(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces, in place, norms, gated MLPs and the rotary embedding inside attention that are written as most models';
    what is written otherwise stays, and so does what would lose its hooks."""
    for path, module in list(model.named_modules()):
        if is_rms_norm(module):
            model.set_submodule(path, RMSNorm(module))
        elif is_gated_silu(module):
            model.set_submodule(path, GatedMLP(module))
        elif embeds_by_halves(module):
            embed_by(module, rotary)
    return model
