"""AffineQuant's dense matrix under its gradual mask (arXiv 2403.12544)."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.base import Factor, Map, SiteStatistics, condition_number
from aq_lightning.transforms.inverse import Method, inverse, tolerance
from aq_lightning.transforms.online import BlockProduct, Operation, block_product

Schedule = Literal["exact", "paper", "none"]
"""How the band widens: see :func:`band_width`."""

_LEAST_DIAGONAL = 1e-3  # of matrices that start at the identity


def band_width(epoch: int, epochs: int, size: int, schedule: Schedule = "exact") -> int:
    """Off-diagonals open on each side in ``epoch`` (0 … epochs − 1): none at first, all ``size − 1`` at last.

    One epoch opens all at once.

    Args:
        epoch, epochs, size: where the schedule stands, and the matrix's side.
        schedule: ``exact``, ⌊(size − 1) epoch / (epochs − 1)⌋ in integer arithmetic; ``paper``, the same in the
            floating point of the published code, which at some sizes (4096 in 20 epochs) never opens the corner
            entries; ``none``, everything open from the first epoch on.
    """
    if epochs <= 1 or schedule == "none":
        return size - 1
    if schedule == "paper":
        return int((size - 1) / (epochs - 1) * epoch)
    return (size - 1) * epoch // (epochs - 1)


def gradual_mask(size: int, width: int, stability: float, like: Tensor) -> Tensor:
    """(size, size): 1 on the diagonal, ``stability`` where ``0 < |i − j| ≤ width``, 0 elsewhere (paper, eq. 6)."""
    index = torch.arange(size, device=like.device)
    distance = (index[:, None] - index).abs()  # (size, size)
    band = (distance <= width).to(like.dtype) * stability
    return torch.where(distance == 0, torch.ones((), dtype=like.dtype, device=like.device), band)


def _divided(shape: SiteShape, block: int, online: bool) -> SiteShape:
    """The channels of a site as blocks of another width.

    Raises:
        RequestError: the width does not divide them, or the matrix would fold, which takes the site's own blocks.
    """
    if not online:
        raise RequestError(f"Affine.block cuts an online matrix, got {block} without online: add online: true, or "
                           "leave block out for the site's own blocks.")  # fmt: skip
    if block < 1 or shape.channels % block:
        divisors = [width for width in range(1, shape.channels) if shape.channels % width == 0]
        common = [width for width in divisors if width % 64 == 0] or divisors
        raise RequestError(f"Affine.block must divide the {shape.channels} channels of its site, got {block}: use "
                           f"{' or '.join(map(str, common))}, or null for one matrix.")  # fmt: skip
    return SiteShape(shape.channels // block, block)


def _row_sums(matrix: Tensor) -> Tensor:
    """``Σ|row|``, (…, size, size) → (…, size), in one look at the matrix."""
    return torch.linalg.vector_norm(matrix, 1, dim=-1)


def _varah(diagonal: Tensor, others: Tensor) -> Tensor:
    """:meth:`Affine.bound` from absolute diagonals and sums of absolute off-diagonals, (blocks, size) each."""
    return ((diagonal + others).amax(-1) / (diagonal - others).amin(-1).clamp(min=0)).max()


class Affine(Factor):
    """One dense matrix per block of channels, ``A ⊙ mask``, starting at the identity.

    The effective matrix is the masked one everywhere: forward, inverse, merge and file. Before training only the
    diagonal is open; :class:`callbacks.GradualMask` widens the band. Invertible at every step: :meth:`project` keeps
    it strictly diagonally dominant by rows (Levy–Desplanques).

    Args:
        shape: blocks (key-value heads) and channels of each.
        stability: factor on the off-diagonals (the paper's α, its code's ``sf``), in (0, 1].
        dominance: greatest ratio of a row's off-diagonals, summed in absolute value, to its diagonal, in (0, 1);
            None leaves the matrix free, as the paper's code does, and inverts it with pivoting.
        inverse: how it is inverted in training: see :func:`aq_lightning.transforms.inverse.inverse`.
        online: whether the activation is multiplied by A⁻¹ at run time: at any site with consumers, at a cost.
        block: width of an online matrix's diagonal blocks; None: the site's own, all channels or those of a head.
    """

    group: ClassVar[Group] = Group.HEAD

    def __init__(
        self,
        shape: SiteShape,
        stability: float = 0.1,
        dominance: float | None = 0.9,
        inverse: Method = "lu",
        online: bool = False,
        block: int | None = None,
    ) -> None:
        super().__init__()
        if block is not None:
            shape = _divided(shape, block, online)
        self.online = online
        if not 0 < stability <= 1:
            raise RequestError(f"Affine.stability lies in (0, 1], got {stability}: 0.1 is the paper's for heads.")
        if dominance is not None and not 0 < dominance < 1:
            raise RequestError(f"Affine.dominance lies in (0, 1), got {dominance}: use 0.9, or null for none.")
        if inverse not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise RequestError(
                f"Affine.inverse is one of {known}, got {inverse!r}: use lu, or mixed for large matrices."
            )
        self.shape = shape
        self.dominance = dominance
        self.stability = stability
        self.method = inverse if dominance is not None else "pivoted"
        self.matrix = nn.Parameter(torch.eye(shape.size, dtype=torch.float64).repeat(shape.blocks, 1, 1))
        self.register_buffer("mask", gradual_mask(shape.size, 0, stability, self.matrix))  # (size, size)
        last = self.matrix.detach().clone() if self._follows() else None  # (blocks, size, size): an inverse
        self.register_buffer("last", last, persistent=False)
        for worst in ("residual", "worst_bound"):  # of inverse and bound, since they were zeroed
            self.register_buffer(worst, self.matrix.new_zeros(()), persistent=False)

    def _follows(self) -> bool:
        """Whether an inverse starts from the last one."""
        return self.method in ("newton", "mixed")

    def initialize(self, statistics: SiteStatistics) -> None:
        """Stays at the identity; scales belong to a :class:`Diagonal` before it."""

    def open_band(self, epoch: int, epochs: int, schedule: Schedule = "exact") -> bool:
        """Sets the mask of ``epoch`` (0 … epochs − 1), whose new entries start at 0; says whether it widened."""
        width = band_width(epoch, epochs, self.shape.size, schedule)
        self.mask.copy_(gradual_mask(self.shape.size, width, self.stability, self.mask))
        return epoch == 0 or width > band_width(epoch - 1, epochs, self.shape.size, schedule)

    @torch.no_grad()
    def project(self) -> Tensor:
        """Scales rows back into dominance; a diagonal entry that training brought below its floor returns to it.

        With row sums at most ``dominance`` times a diagonal of at least the floor, Varah's bound
        ``‖A⁻¹‖∞ ≤ 1 / ((1 − dominance) · floor)`` holds after every step.

        Returns:
            :meth:`bound` of the matrix as it is now.
        """
        if self.dominance is None:
            return self.bound()
        diagonal = self.matrix.diagonal(dim1=-2, dim2=-1)  # (blocks, size), a view
        diagonal.clamp_(min=_LEAST_DIAGONAL)
        sums = _row_sums(self.effective()) - diagonal  # (blocks, size)
        factor = (self.dominance * diagonal / sums.clamp(min=torch.finfo(sums.dtype).tiny)).clamp(max=1)
        kept = diagonal.clone()
        self.matrix.mul_(factor[..., None])
        diagonal.copy_(kept)
        return _varah(kept, factor * sums)

    def margin(self) -> Tensor:
        """Least ``1 − Σ|off-diagonals| / |diagonal|`` over all rows: positive iff strictly dominant; float64 scalar."""
        matrix = self.effective().detach()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).abs()
        return (1 - (_row_sums(matrix) - diagonal) / diagonal).min()

    def bound(self) -> Tensor:
        """Varah's bound on the condition number in the ∞-norm, infinite without dominance; float64 scalar.

        ``‖A‖∞ ‖A⁻¹‖∞ ≤ max Σ|row| / min(|diagonal| − Σ|off-diagonals|)`` (Varah 1975), the worst block.
        """
        matrix = self.effective().detach()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).abs()  # (blocks, size)
        return _varah(diagonal, _row_sums(matrix) - diagonal)

    def effective(self) -> Tensor:
        """``A ⊙ mask``, float64 (blocks, size, size)."""
        return self.matrix * self.mask

    def forward(self, dtype: torch.dtype) -> Map:
        matrix = self.effective()
        inverted = self._inverse(matrix).to(dtype)
        transposed = matrix.mT.to(dtype)
        return Map(
            lambda x: block_product(x, inverted),
            lambda w: block_product(w, transposed),
            online=({"inverse": inverted},) if self.online else (),
        )

    def _inverse(self, matrix: Tensor) -> Tensor:
        """(blocks, size, size). In training the residual is kept, and on a GPU not looked at: see :meth:`doubt`."""
        if not torch.is_grad_enabled():
            return inverse(matrix, "lu" if self._follows() else self.method)[0]
        found, residual = inverse(matrix, self.method, self.last, wait=not matrix.is_cuda)
        self.residual.copy_(torch.maximum(self.residual, residual.detach()))
        if self.last is not None:
            self.last.copy_(found.detach())
        return found

    def doubt(self) -> bool:
        """Turns to pivoting for good if the inverse was ever out of tolerance; says whether that changes anything."""
        doubted = self.method != "pivoted" and not float(self.residual) <= tolerance(self.method)
        self.method = "pivoted" if doubted else self.method
        return doubted

    def operation(self) -> Operation:
        return BlockProduct(inverse=torch.empty_like(self.matrix, device="meta"))

    def condition(self) -> Tensor:
        return condition_number(self.effective().detach())
