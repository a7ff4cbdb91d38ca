"""Squared error relative to each token's own size."""

from __future__ import annotations

import torch
from torch import Tensor

from aq_lightning.objectives.base import Objective


class RelativeMSE(Objective):
    r"""Mean over tokens of :math:`\|y_t - a_t\|^2 / \|a_t\|^2`.

    A few tokens carry activations hundreds of times larger than the rest (attention sinks, mostly the first token);
    under plain mean squared error their rounding errors outweigh all other tokens together.
    """

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        target = target.to(output.dtype)
        error, size = (output - target).square().sum(-1), target.square().sum(-1)  # (batch, length) each
        return (error / size.clamp(min=torch.finfo(size.dtype).smallest_normal)).mean()
