r"""A Kronecker product of two small matrices over all channels of a site: FlatQuant's (arXiv 2410.09426)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics, condition_number
from aq_lightning.transforms.geometric_mean import geometric_mean, inverse_root
from aq_lightning.transforms.hadamard import has_hadamard
from aq_lightning.transforms.online import KroneckerProduct, Operation, kronecker_product
from aq_lightning.transforms.parametrizations import Form, Start, matrices


def divided(channels: int, start: Start) -> tuple[int, int]:
    """``channels`` = n₁ n₂ with n₁ ≤ n₂ as near to each other as can be, both with a Hadamard matrix if it starts so.

    Raises:
        RequestError: no two such orders.
    """
    divisors = [n for n in range(1, int(channels**0.5) + 1) if channels % n == 0]
    if start == "hadamard":
        divisors = [n for n in divisors if has_hadamard(n) and has_hadamard(channels // n)]
    if not divisors and channels:
        raise RequestError(f"No two Hadamard matrices are known whose orders multiply to {channels}: start at random.")
    least = max(divisors, default=1)
    return least, channels // least


class Kronecker(Factor):
    r"""``A = A₁ ⊗ A₂``: channel :math:`i n_2 + j` is row i, column j of a token's matrix X, and X becomes
    :math:`A_1^{-T} X A_2^{-1}`, at :math:`n (n_1 + n_2)` multiply–adds per token instead of :math:`n^2`. Always online.

    Args:
        shape: channels of the site.
        form: how both matrices are trained.
        start: where they start.
        balance: whether the start is stretched so that activations and weights come into balance:
            :func:`geometric_mean` of both sides' second moments, of which each matrix takes its partial trace. Then
            the noise that rounding adds is least for the size of both (CAT, arXiv 2603.04359; WUSH, arXiv 2512.00956).
        seed: of a random start.

    Raises:
        RequestError: a form that stays orthogonal is to be stretched.
    """

    group: ClassVar[Group] = Group.ALL
    online: ClassVar[bool] = True
    written_out: ClassVar[bool] = False

    def __init__(
        self,
        shape: SiteShape,
        form: Form = "free",
        start: Start = "random",
        balance: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if balance and form not in ("free", "ldu"):
            raise RequestError(f"A balanced start is not orthogonal, got form {form!r}: use free or ldu.")
        self.balances = balance
        channels = shape.channels * shape.group
        self.shape = SiteShape(1, channels)
        self.sizes = divided(channels, start)
        self.left, self.right = (matrices(1, n, form, start, seed + k) for k, n in enumerate(self.sizes))

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays where it starts; scales belong to a :class:`Diagonal` before it."""

    @torch.no_grad()
    def balance(self, read: Tensor, weights: Tensor) -> None:
        r"""``A ← (G₁^{-½} ⊗ G₂^{-½}) A``: with :math:`G = Σ_w \# Σ_x^{-1}`, :math:`x G^{½}` and
        :math:`W G^{-½}` have moments in proportion, and a mean of Kronecker products is that of their factors."""
        shape = (*self.sizes, *self.sizes)
        for side, traced in ((self.left, "ibjb->ij"), (self.right, "aiaj->ij")):
            traces = [torch.einsum(traced, moments.view(shape)) for moments in (weights, read)]
            side.stretch(inverse_root(geometric_mean(*traces)))

    def forward(self, dtype: torch.dtype) -> Map:
        (left, left_inverse), (right, right_inverse) = (
            (each[0].to(dtype) for each in side()) for side in (self.left, self.right)
        )  # (n₁, n₁) and (n₂, n₂)
        return Map(
            lambda x: kronecker_product(x, left_inverse, right_inverse),
            lambda w: kronecker_product(w, left.mT, right.mT),
            online=({"left": left_inverse, "right": right_inverse},),
        )

    def operation(self) -> Operation:
        left, right = (torch.empty(n, n, dtype=torch.float64, device="meta") for n in self.sizes)
        return KroneckerProduct(left=left, right=right)

    @torch.no_grad()
    def condition(self) -> Tensor:
        return condition_number(self.left()[0]) * condition_number(self.right()[0])
