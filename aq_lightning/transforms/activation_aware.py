"""AWQ's scales: one per channel, as large as pays for the channel's activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics
from aq_lightning.transforms.diagonal import Diagonal

_LEAST = 1e-4  # of scales before they are normalized, as in AWQ's release


class ActivationAware(Factor):
    r"""``A = diag(s)`` with s searched (AWQ, arXiv 2306.00978, eq. 4 and 5), and trained if the recipe has step sizes.

    .. math:: s = \bar a^r / \sqrt{\max \bar a^r \cdot \min \bar a^r}, \qquad \bar a = \text{mean}\,|x|,

    with the one of the exponents r = 0, 1/steps, …, 1 − 1/steps that leaves the least error of what the consumers
    answer when their weights are rounded. 0 is among them: no scale at all.

    Args:
        shape: channels of the site.
        steps: exponents that are tried.
    """

    group: ClassVar[Group] = Group.DIAGONAL
    searches: ClassVar[bool] = True

    def __init__(self, shape: SiteShape, steps: int = 20) -> None:
        super().__init__()
        if steps < 1:
            raise RequestError(f"ActivationAware.steps is 1 or more, got {steps}: 20 is AWQ's.")
        self.shape = shape
        self.steps = steps
        self.diagonal = Diagonal(shape, alpha=None)
        self.magnitude: Tensor | None = None  # (blocks, size)

    def initialize(self, statistics: SiteStatistics) -> None:
        self.magnitude = statistics.magnitude

    def search(self, error: Callable[[], float]) -> None:
        logarithms = [self._logarithm(step / self.steps) for step in range(self.steps)]
        errors = []
        for each in logarithms:
            self.diagonal.log_scale.data.copy_(each)
            errors.append(error())
        self.diagonal.log_scale.data.copy_(logarithms[errors.index(min(errors))])

    def _logarithm(self, exponent: float) -> Tensor:
        """Of the scales of one exponent, (blocks, size)."""
        logarithm = (self.magnitude**exponent).clamp(min=_LEAST).log()
        return logarithm - (logarithm.max() + logarithm.min()) / 2

    def forward(self, dtype: torch.dtype) -> Map:
        return self.diagonal(dtype)

    def condition(self) -> Tensor:
        return self.diagonal.condition()
