"""Mean squared error of the block's output, the objective of OmniQuant and AffineQuant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from aq_lightning.objectives.base import Objective


class BlockMSE(Objective):
    """Mean squared error between outputs; twice it for a merged target, whose two teachers it stands for."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        error = functional.mse_loss(output, target.to(output.dtype))
        return 2 * error if self.same_input else error
