"""Mean squared error of the block's output, the objective of OmniQuant and AffineQuant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from aq_lightning.objectives.base import Objective


class BlockMSE(Objective):
    r"""Mean squared error between outputs.

    Args:
        same_input: adds a second teacher that reads the same, quantized input (the reference's ``aug_loss``). Because
            :math:`\|a - y\|^2 + \|b - y\|^2 = 2 \|\tfrac{a + b}{2} - y\|^2 + \text{const}`, one merged target gives
            the same gradient and needs no third stream.
    """

    def __init__(self, same_input: bool = False) -> None:
        self.same_input = same_input

    def target(self, full: Tensor, same: Tensor | None) -> Tensor:
        return full if same is None else torch.lerp(full, same, 0.5)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        error = functional.mse_loss(output, target.to(output.dtype))
        return 2 * error if self.same_input else error
