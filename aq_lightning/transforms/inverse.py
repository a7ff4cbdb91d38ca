r"""Inverses of batches of small matrices in float64, checked by their residual.

One custom operator, so that compiled training steps keep it whole, with the derivative written by hand from the stored
inverse: :math:`\bar A = -A^{-T} \bar X A^{-T}` for :math:`X = A^{-1}`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aq_lightning.kernels.elimination import eliminate

Method = Literal["lu", "newton", "normal", "pivoted"]
"""How :func:`inverse` is computed."""

TOLERANCE = 1e-9
"""Greatest residual ``‖I − A X‖∞`` at which ``X`` passes for the inverse."""
_LEAF = 128  # size up to which one call of the library, or of the kernel, is fastest
_STEPS = 5  # of Newton's iteration: from a residual of 0.3, what one optimizer step leaves, to rounding


def inverse(
    matrix: Tensor, method: Method = "lu", start: Tensor | None = None, wait: bool = True
) -> tuple[Tensor, Tensor]:
    """Inverse of each matrix and how far it is from one.

    Args:
        matrix: float64 (…, size, size).
        method: ``lu``, elimination without pivoting, which strictly diagonally dominant matrices do not need;
            ``newton``, ``X ← X + X (I − A X)`` from ``start``; ``normal``, ``(Aᵀ A)⁻¹ Aᵀ`` with elimination, which
            positive definite matrices allow, and one of Newton's steps, for condition numbers up to about 10⁵;
            ``pivoted``, for any matrix, as torch.linalg.inv. CUDA graphs can record all but the last.
        start: where Newton's iteration starts, an inverse of almost this matrix, shape of ``matrix``.
        wait: whether to look at the residual and, where it is beyond :data:`TOLERANCE`, to invert with pivoting. Costs
            nothing on a CPU; on a GPU the host waits for the device.

    Returns:
        ``X``, shape of ``matrix``, differentiable once in ``matrix``; and ``‖I − A X‖∞``, the worst, a scalar.
    """
    return _inverse(matrix, start, method, wait)


@torch.library.custom_op(
    "aq_lightning::inverse",
    mutates_args=(),
    schema="(Tensor matrix, Tensor? start, str method, bool wait) -> (Tensor, Tensor)",
)
def _inverse(matrix: Tensor, start: Tensor | None, method: str, wait: bool) -> tuple[Tensor, Tensor]:
    if method == "pivoted":
        found = torch.linalg.inv_ex(matrix).inverse
    elif method == "newton":
        found = _newton(matrix, start, _STEPS)
    elif method == "normal":
        found = _newton(matrix, _eliminated(matrix.mT @ matrix) @ matrix.mT, 1)
    else:
        found = _eliminated(matrix)
    residual = _residual(matrix, found)
    if wait and method != "pivoted" and not bool(residual <= TOLERANCE):
        found = torch.linalg.inv_ex(matrix).inverse
        residual = _residual(matrix, found)
    return found.contiguous(), residual


@_inverse.register_fake
def _(matrix: Tensor, start: Tensor | None, method: str, wait: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format), matrix.new_empty(())


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0])


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (found,) = ctx.saved_tensors
    return -(found.mT @ gradient @ found.mT), None, None, None


_inverse.register_autograd(_backward, setup_context=_keep)


def _residual(matrix: Tensor, found: Tensor) -> Tensor:
    """``‖I − A X‖∞``, the worst of the batch; a scalar."""
    return _defect(matrix, found).abs().sum(-1).amax()


def _defect(matrix: Tensor, found: Tensor) -> Tensor:
    """``I − A X``."""
    defect = -(matrix @ found)
    defect.diagonal(dim1=-2, dim2=-1).add_(1)
    return defect


def _newton(matrix: Tensor, start: Tensor, steps: int) -> Tensor:
    """Schulz's iteration, each step of which squares the residual."""
    for _ in range(steps):
        start = start + start @ _defect(matrix, start)
    return start


def _eliminated(matrix: Tensor) -> Tensor:
    r"""Elimination of halves, without pivoting: Schur complements of dominant matrices are dominant.

    With :math:`S = D - C A^{-1} B` the inverse of :math:`\begin{pmatrix} A & B \\ C & D \end{pmatrix}` is
    :math:`\begin{pmatrix} A^{-1} + A^{-1} B S^{-1} C A^{-1} & -A^{-1} B S^{-1} \\ -S^{-1} C A^{-1} & S^{-1}
    \end{pmatrix}`.
    """
    size = matrix.shape[-1]
    if size <= _LEAF:
        return _leaf(matrix)
    half = size // 2
    (a, b), (c, d) = (rows.split((half, size - half), -1) for rows in matrix.split((half, size - half), -2))
    first = _eliminated(a)
    below = c @ first  # C A⁻¹
    second = _eliminated(d - below @ b)  # S⁻¹
    right = first @ b @ second  # A⁻¹ B S⁻¹
    upper = torch.cat([first + right @ below, -right], -1)
    return torch.cat([upper, torch.cat([-(second @ below), second], -1)], -2)


def _leaf(matrix: Tensor) -> Tensor:
    """By a kernel that graphs can record: the library's own calls wait for the device. LAPACK pivots inside a leaf."""
    return eliminate(matrix) if matrix.is_cuda else torch.linalg.inv_ex(matrix).inverse
