"""One matrix across the query heads, at the output projection's input: FlatQuant's P_o, QuaRot's across-head part."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics, condition_number
from aq_lightning.transforms.online import HeadProduct, Operation, head_product
from aq_lightning.transforms.parametrizations import Form, Start, matrices


class AcrossHeads(Factor):
    r"""``A = A_h ⊗ I``: channel j of head i becomes a mixture of the channels j of all heads. Always online.

    A matrix inside each head folds: put a :class:`Dense` before it.

    Args:
        shape: heads and their channels.
        form: how it is trained.
        start: where it starts.
        seed: of a random start.

    Raises:
        RequestError: a site without heads.
    """

    group: ClassVar[Group] = Group.ALL
    online: ClassVar[bool] = True
    written_out: ClassVar[bool] = False

    def __init__(self, shape: SiteShape, form: Form = "free", start: Start = "random", seed: int = 0) -> None:
        super().__init__()
        self.heads = shape.blocks * shape.group
        if self.heads == 1:
            raise RequestError("AcrossHeads mixes several heads, got a site with 1: remove it, or use Kronecker.")
        self.shape = SiteShape(1, self.heads * shape.size)
        self.core = matrices(1, self.heads, form, start, seed)

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays where it starts."""

    def forward(self, dtype: torch.dtype) -> Map:
        matrix, inverted = (each[0].to(dtype) for each in self.core())  # (heads, heads) each
        return Map(
            lambda x: head_product(x, inverted),
            lambda w: head_product(w, matrix.mT),
            online=({"heads": inverted},),
        )

    def operation(self) -> Operation:
        return HeadProduct(heads=torch.empty(self.heads, self.heads, dtype=torch.float64, device="meta"))

    @torch.no_grad()
    def condition(self) -> Tensor:
        return condition_number(self.core()[0])
