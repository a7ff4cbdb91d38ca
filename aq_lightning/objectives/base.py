"""What a block is fitted to."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Objective(ABC):
    """Loss between a quantized block's output and its target. Subclasses are final."""

    same_input: bool
    """Whether the target needs the full-precision block's answer to the quantized stream too."""

    @abstractmethod
    def target(self, full: Tensor, same: Tensor | None) -> Tensor:
        """The one tensor to keep per sample.

        Args:
            full: full-precision block on the full-precision stream, (samples, length, hidden).
            same: full-precision block on the quantized stream, same shape; given iff ``same_input``.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss, float32 or wider; ``output`` and ``target`` are (batch, length, hidden)."""
