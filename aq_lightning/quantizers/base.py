"""What every weight quantizer shares: groups in, grid and codes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aq_lightning.qtensor import QTensor, decode, encode, grid_of
from aq_lightning.scheme import Grid


class WeightQuantizer(nn.Module, ABC):
    """Rounds one linear's weight, or the stacked ones of experts, to its grid. A subclass gives each group's range.

    One that learns to round sets ``offset`` too, a parameter (out, in): steps added to each weight before rounding.
    Training's fake quantization and the merged :class:`QTensor` come from the same lines.

    Args:
        grid: bits, group size, symmetry.
        shape: (out, in) of the weight, (experts · out, in) of stacked ones.
        storage: dtype of the scales in the checkpoint.

    Raises:
        RequestError: the group size does not divide the input channels.
    """

    def __init__(self, grid: Grid, shape: tuple[int, int], storage: torch.dtype) -> None:
        super().__init__()
        self.grid = grid
        self.storage = storage
        self.grouped = (shape[0], grid.groups(shape[1]), -1)  # (out, groups, size)
        self.register_parameter("offset", None)

    @abstractmethod
    def fractions(self) -> tuple[Tensor, Tensor]:
        """Where each group's range ends: fractions of its least and of its greatest weight, each (out, groups)."""

    def project(self) -> None:
        """Brings parameters that a step took out of bounds back; called after every step."""

    def _encode(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, in) → codes (out, groups, size), scale and zero (out, groups, 1)."""
        groups = weight.reshape(self.grouped)
        low, high = (fraction[..., None].to(groups.dtype) for fraction in self.fractions())  # (out, groups, 1) each
        ends = groups.amin(-1, keepdim=True) * low, groups.amax(-1, keepdim=True) * high
        scale, zero = grid_of(*ends, self.grid, self.storage)
        offset = None if self.offset is None else self.offset.view(self.grouped).to(groups.dtype)
        return encode(groups, scale, zero, self.grid, offset), scale, zero

    def forward(self, weight: Tensor) -> Tensor:
        """Fake quantization: the weight the integers stand for, in the shape and dtype given; differentiable."""
        return decode(*self._encode(weight)).reshape(weight.shape)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QTensor:
        """The integers themselves, (out, in); rows of stacked weights follow one another."""
        codes, scale, zero = self._encode(weight)
        return QTensor(
            codes.flatten(1).to(torch.uint8),
            scale.squeeze(-1).to(self.storage),
            zero.squeeze(-1).to(torch.uint8),
            self.grid,
        )


WeightQuantizerFactory = Callable[[Grid, tuple[int, int], torch.dtype], WeightQuantizer]
"""A weight quantizer with its hyper-parameters given: what a recipe holds."""
