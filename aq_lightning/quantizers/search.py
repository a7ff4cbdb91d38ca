"""Ranges found by search instead of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.qtensor import decode, encode, grid_of
from aq_lightning.scheme import Grid

_AT_ONCE = {"cuda": 2**24}  # elements: candidates of small weights are rounded side by side where there is room


@dataclass(frozen=True)
class GridSearch:
    r"""Where to end the range of each group so that its rounding error is least.

    Both ends are moved together from the whole range down to a part of it; then, unless the grid is symmetric, each by
    itself. The whole range is the first candidate, so the error is never above that of round-to-nearest.
    """

    weighting: Literal["none", "diagonal", "full"] = "none"
    r"""The error of a group: :math:`\sum_c |w_c - \hat w_c|^p`; weighted by the mean square of the activation that each
    weight meets; or :math:`(w - \hat w) H (w - \hat w)^T`, the square error of what the group adds to the output."""
    power: float = 2.0
    """p; GPTQ's tools use 2.4, which spares the greatest errors of unweighted ones."""
    steps: int = 80
    """Parts of the range that are tried."""
    least: float = 0.2
    """The smallest of them."""

    def __post_init__(self) -> None:
        if self.weighting == "full" and self.power != 2:
            raise RequestError(f"Output errors are squared, got power {self.power}: leave it at 2 with weighting full.")
        if self.steps < 1 or not 0 < self.least < 1:
            raise RequestError(
                f"A range is shrunk in 1 step or more to a part in (0, 1), got {self.steps} steps to {self.least}: "
                "try 80 to 0.2."
            )

    @torch.no_grad()
    def __call__(
        self, groups: Tensor, second: Tensor | None, grid: Grid, storage: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Finds the ranges.

        Args:
            groups: a weight, (out, groups, size).
            second: second moments of its input, (in, in); may be None without weighting.
            grid, storage: of the codes and scales.

        Returns:
            Fractions of the least and of the greatest weight of each group, (out, groups) each.
        """
        least, greatest = groups.amin(-1), groups.amax(-1)  # (out, groups), like all below
        blocks = None if self.weighting == "none" else self._blocks(second.to(groups.dtype), groups.shape[1])
        fractions = [torch.ones_like(least), torch.ones_like(least)]
        best = torch.full_like(least, torch.inf)
        parts = torch.linspace(1, self.least, self.steps + 1).to(least)
        together = max(1, _AT_ONCE.get(groups.device.type, 0) // groups.numel())
        for moving in ((0, 1),) if grid.symmetric else ((0, 1), (0,), (1,)):
            fixed = list(fractions)
            for part in parts.split(together):
                candidates = part.view(-1, 1, 1).expand(-1, *least.shape)  # (candidates, out, groups)
                tried = [candidates if end in moving else fixed[end].expand_as(candidates) for end in (0, 1)]
                ends = least * tried[0], greatest * tried[1]
                scale, zero = (each[..., None] for each in grid_of(*ends, grid, storage))
                error = self._error(groups - decode(encode(groups, scale, zero, grid), scale, zero), blocks)
                first = error.nan_to_num(torch.inf).argmin(0, keepdim=True)  # of the least
                error, *tried = (each.gather(0, first)[0] for each in (error, *tried))
                better = error < best
                best = torch.where(better, error, best)
                fractions = [torch.where(better, new, old) for new, old in zip(tried, fractions, strict=True)]
        return fractions[0], fractions[1]

    def _blocks(self, second: Tensor, groups: int) -> Tensor:
        """Moments among the channels of each group: (groups, size), or (groups, size, size)."""
        if self.weighting == "diagonal":
            return second.diagonal().view(groups, -1)
        size = second.shape[0] // groups
        return second.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def _error(self, off: Tensor, blocks: Tensor | None) -> Tensor:
        """(…, out, groups, size) → (…, out, groups)."""
        if self.weighting == "full":
            return (torch.einsum("...ogs,gst->...ogt", off, blocks) * off).sum(-1)
        error = off.abs() ** self.power
        return (error if blocks is None else error * blocks).sum(-1)
