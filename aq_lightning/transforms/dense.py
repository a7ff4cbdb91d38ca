"""One invertible matrix per head, all of it trained from the first step on."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics, condition_number
from aq_lightning.transforms.online import BlockProduct, Operation, PairProduct, block_product
from aq_lightning.transforms.parametrizations import Form, Start, matrices


class Dense(Factor):
    """A matrix per block of channels (FlatQuant's P_v and P_h, arXiv 2410.09426; QuaRot's and SpinQuant's R2 and R3).

    Online between queries and keys it acts behind rotary embedding: keys times Aᵀ, queries times A⁻¹.

    Args:
        shape: blocks (key-value heads) and channels of each.
        form: how it is trained.
        start: where it starts.
        shared: whether all heads have one.
        online: whether activations are multiplied by A⁻¹ at run time.
        seed: of a random start.
    """

    group: ClassVar[Group] = Group.HEAD

    def __init__(
        self,
        shape: SiteShape,
        form: Form = "free",
        start: Start = "identity",
        shared: bool = False,
        online: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape = SiteShape(1, shape.size, dual=shape.dual) if shared else shape
        self.online = online
        self.core = matrices(self.shape.blocks, shape.size, form, start, seed)

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays where it starts; scales belong to a :class:`Diagonal` before it."""

    def forward(self, dtype: torch.dtype) -> Map:
        matrix, inverted = (each.to(dtype) for each in self.core())  # (blocks, size, size) each
        tensors = {"query": inverted, "key": matrix.mT} if self.shape.dual else {"inverse": inverted}
        return Map(
            lambda x: block_product(x, inverted),
            lambda w: block_product(w, matrix.mT),
            online=(tensors,) if self.online else (),
        )

    def operation(self) -> Operation:
        empty = torch.empty(self.shape.blocks, self.shape.size, self.shape.size, dtype=torch.float64, device="meta")
        return PairProduct(query=empty, key=empty) if self.shape.dual else BlockProduct(inverse=empty)

    @torch.no_grad()
    def condition(self) -> Tensor:
        return condition_number(self.core()[0])
