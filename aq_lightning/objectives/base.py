"""What a block is fitted to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Objective(ABC):
    r"""Loss between a quantized block's output and its target. A subclass is final and gives the loss alone.

    Args:
        same_input: adds a second teacher that reads the same, quantized input (the reference's ``aug_loss``). Because
            :math:`\|a - y\|^2 + \|b - y\|^2 = 2 \|\tfrac{a + b}{2} - y\|^2 + \text{const}`, one merged target gives
            the same gradient and needs no third stream.
    """

    def __init__(self, same_input: bool = False) -> None:
        self.same_input = same_input

    def target(self, full: Tensor, same: Tensor | None) -> Tensor:
        """The one tensor to keep per sample.

        Args:
            full: full-precision block on the full-precision stream, (samples, length, hidden).
            same: full-precision block on the quantized stream, same shape; given iff ``same_input``.
        """
        return full if same is None else torch.lerp(full, same, 0.5)

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss, float32 or wider; ``output`` and ``target`` are (batch, length, hidden)."""
