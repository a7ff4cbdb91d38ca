"""One positive factor per channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics
from aq_lightning.transforms.settled import settled

_LEAST = 1e-5  # of scales and of what they are made from, as in SmoothQuant's release


class Diagonal(Factor):
    r"""``A = diag(s)``, trained as ``log s`` so that it is positive, hence invertible, at every step.

    Starts at SmoothQuant's balance (arXiv 2211.10438, eq. 4) of activations against weights,
    :math:`s = \max|x|^α / \max|W|^{1-α}`, with the greatest weight over all consumers.

    Args:
        shape: channels of the site.
        alpha: α in [0, 1], how much of the activations' range moves into the weights; None starts at 1.
    """

    group: ClassVar[Group] = Group.DIAGONAL

    def __init__(self, shape: SiteShape, alpha: float | None = 0.5) -> None:
        super().__init__()
        if alpha is not None and not 0 <= alpha <= 1:
            raise RequestError(f"Diagonal.alpha lies in [0, 1], got {alpha}: 0.5 balances weights and activations.")
        self.shape = shape
        self.alpha = alpha
        self.log_scale = nn.Parameter(torch.zeros(shape.blocks, shape.size, dtype=torch.float64))

    def initialize(self, statistics: SiteStatistics) -> None:
        if self.alpha is None:
            return
        activation = torch.maximum(-statistics.low, statistics.high).clamp(min=_LEAST)
        weight = statistics.weight_max.clamp(min=_LEAST)
        scale = (activation**self.alpha / weight ** (1 - self.alpha)).clamp(min=_LEAST)
        self.log_scale.data.copy_(scale.log())

    def forward(self, dtype: torch.dtype) -> Map:
        scale = settled(self.log_scale.exp()[:, None], dtype)  # (blocks, 1, size)
        split, join = self.shape.split, self.shape.join
        return Map(lambda x: join(split(x) / scale), lambda w: join(split(w) * scale), diagonal=True)

    def condition(self) -> Tensor:
        return (self.log_scale.detach().amax(1) - self.log_scale.detach().amin(1)).exp().max()
