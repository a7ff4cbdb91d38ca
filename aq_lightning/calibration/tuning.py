r"""Scales and norms of a quantized model trained together, on what the full-precision model says; codes stay.

The whole model at once sees what blocks one by one cannot: errors of one that another can undo. With codes :math:`u`
and zero points :math:`z` fixed, only the scales :math:`s` of :math:`\hat w = (u - z)\, s` and the tensors that were
never quantized in the blocks (norms, biases) move, by the divergence

.. math:: \mathrm{KL}(p \,\|\, \hat p) = \sum_t p_t \log (p_t / \hat p_t)

of the next token's distributions, the mean over all positions. Training step sizes alone after all codes are fixed is
the second phase of EfficientQAT (arXiv 2407.11062), there by the text's own next tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from aq_lightning.errors import RequestError
from aq_lightning.qtensor import QTensor, decode
from aq_lightning.recipe import OptimizerFactory


@dataclass(frozen=True)
class ScaleTuning:
    """What follows once every block is rounded: scales and norms of the whole model trained together."""

    epochs: int
    """Passes over the calibration windows."""
    optimizer: OptimizerFactory
    """Optimizer of all parameters."""
    scales: float
    """Step size of the logarithms of scales."""
    norms: float
    """Step size of norms and biases, relative to the root of their mean square."""
    batch_size: int = 4
    """Windows of text to a step."""


class _Decode(torch.autograd.Function):
    """``(u − z) s``; keeps nothing but the codes for the backward pass."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, zero)
        groups = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)  # (out, groups, size)
        return decode(groups, scale[..., None], zero.to(scale.dtype)[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        codes, zero = ctx.saved_tensors
        parts = gradient.unflatten(1, (zero.shape[1], -1))
        steps = codes.unflatten(1, (zero.shape[1], -1)).to(gradient.dtype) - zero.to(gradient.dtype)[..., None]
        return None, None, (parts * steps).sum(-1)


class FromCodes(nn.Module):
    """A parametrization of a linear's weight: fixed codes times scales ``s = s₀ exp(r)``, of which r is trained.

    Args:
        tensor: the quantized weight.
    """

    def __init__(self, tensor: QTensor) -> None:
        super().__init__()
        self.grid, self.storage = tensor.grid, tensor.scale.dtype
        for name in ("codes", "zero", "scale"):
            self.register_buffer(name, getattr(tensor, name))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter to begin with: zeros, float32 (out, groups)."""
        return torch.zeros_like(self.scale, dtype=torch.float32)

    def stored(self, ratio: Tensor) -> Tensor:
        """The scale as a checkpoint keeps it, in its dtype."""
        least = torch.finfo(self.storage).smallest_normal
        return (self.scale.float() * ratio.exp()).to(self.storage).clamp(min=least)

    def forward(self, ratio: Tensor) -> Tensor:
        scale = self.scale.float() * ratio.exp()
        scale = scale + (self.stored(ratio).float() - scale).detach()  # straight through the rounding to storage
        return _Decode.apply(self.codes, self.zero, scale)

    def tensor(self, ratio: Tensor) -> QTensor:
        """The quantized weight with the scales trained."""
        return QTensor(self.codes, self.stored(ratio.detach()), self.zero, self.grid)


class WholeModel(LightningModule):
    """A quantized model under training, beside the one that it shall answer like.

    Args:
        student: the model with the quantized blocks' own weights dequantized, float32.
        teacher: in full precision; not changed.
        blocks: name of the list of blocks in both.
        tensors: weights of the student that are quantized, by name in the model, such as ``model.layers.0.….weight``.
        tuning: step sizes.

    Raises:
        RequestError: a quantized weight is no linear's.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        blocks: str,
        tensors: Mapping[str, QTensor],
        tuning: ScaleTuning,
    ) -> None:
        super().__init__()
        self.student = student.requires_grad_(False)
        self.teacher = teacher.requires_grad_(False).eval()
        self.tuning, self.names = tuning, tuple(tensors)
        self.loss = MeanMetric()
        for name, tensor in tensors.items():
            linear = self._linear(name)
            if not isinstance(linear, nn.Linear):
                raise RequestError(f"Scales are tuned of linears, got {name}: leave model.tuning out for this model.")
            del linear.weight  # which the codes say
            linear.weight = nn.Parameter(torch.empty(0))
            parametrize.register_parametrization(linear, "weight", FromCodes(tensor), unsafe=True)
        self._gains = {
            f"{blocks}.{name}": parameter
            for name, parameter in student.get_submodule(blocks).named_parameters()
            if "parametrizations" not in name
        }
        self._ratios = [self._linear(name).parametrizations.weight.original for name in self.names]
        for parameter in [*self._gains.values(), *self._ratios]:
            parameter.requires_grad_(True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean divergence over a batch of tokens, int64 (batch, length)."""
        with torch.no_grad():
            wanted = self.teacher(input_ids=batch, use_cache=False).logits
        given = self.student(input_ids=batch, use_cache=False).logits
        parts = [divergence(p, q) for p, q in zip(wanted, given, strict=True)]  # one window at a time bounds memory
        loss = torch.stack(parts).mean()
        self.loss.update(loss.detach())
        self.log("divergence", self.loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> object:
        tuning = self.tuning
        groups = [{"params": self._ratios, "lr": tuning.scales}]
        for parameter in self._gains.values():
            size = float(parameter.detach().square().mean().sqrt())
            groups.append({"params": [parameter], "lr": tuning.norms * max(size, 1e-3)})
        optimizer = tuning.optimizer(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def tuned(self) -> dict[str, QTensor | Tensor]:
        """Every quantized weight and every other tensor of the blocks, by name."""
        found = zip(self.names, self._ratios, strict=True)
        weights = {name: self._linear(name).parametrizations.weight[0].tensor(ratio) for name, ratio in found}
        return {**weights, **{name: parameter.detach() for name, parameter in self._gains.items()}}

    def _linear(self, name: str) -> nn.Module:
        return self.student.get_submodule(name.removesuffix(".weight"))


def divergence(wanted: Tensor, given: Tensor) -> Tensor:
    """KL of ``given`` from ``wanted``, logits (length, vocabulary) each; the mean over positions, float32."""
    p, q = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
    return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
