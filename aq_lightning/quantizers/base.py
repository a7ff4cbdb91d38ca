"""What every weight quantizer shares: groups in, grid and codes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from aq_lightning.qtensor import QTensor, decode, encode, grid_of
from aq_lightning.quantizers.search import GridSearch
from aq_lightning.scheme import Grid


class WeightQuantizer(nn.Module, ABC):
    """Rounds one linear's weight, or the stacked ones of experts, to its grid. A subclass gives each group's range.

    One that learns to round sets ``offset`` too, a parameter (out, in): steps added to each weight before rounding.
    Training's fake quantization and the merged :class:`QTensor` come from the same lines.

    Args:
        grid: bits, group size, symmetry.
        shape: (out, in) of the weight, (experts · out, in) of stacked ones.
        storage: dtype of the scales in the checkpoint.
        search: how the ranges are chosen before training; None: they start as they are.

    Raises:
        RequestError: the group size does not divide the input channels.
    """

    def __init__(
        self, grid: Grid, shape: tuple[int, int], storage: torch.dtype, search: GridSearch | None = None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.search = search
        self.storage = storage
        self.grouped = (shape[0], grid.groups(shape[1]), -1)  # (out, groups, size)
        self.register_parameter("offset", None)

    @abstractmethod
    def fractions(self) -> tuple[Tensor, Tensor]:
        """Where each group's range ends: fractions of its least and of its greatest weight, each (out, groups)."""

    def start(self, low: Tensor, high: Tensor) -> None:
        """Sets the ranges from searched fractions, (out, groups) each; called only with a ``search``."""

    def initialize(self, weight: Tensor, seconds: Sequence[Tensor]) -> None:
        """Chooses the ranges by ``search``, if there is one.

        Args:
            weight: what will be rounded, (…, in) with as many rows as ``shape`` says.
            seconds: second moments of the input, (in, in); of stacked weights those of each, which divide the rows;
                none if no search is weighted.
        """
        if self.search is None:
            return
        parts = weight.reshape(self.grouped).chunk(max(len(seconds), 1))
        pairs = zip(parts, seconds or [None], strict=True)
        found = [self.search(part, second, self.grid, self.storage) for part, second in pairs]
        self.start(*(torch.cat(ends) for ends in zip(*found, strict=True)))

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
