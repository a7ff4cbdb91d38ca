r"""Inverses of batches of matrices in float64, checked by their residual.

One custom operator, so that compiled training steps keep it whole, with the derivative written by hand from the stored
inverse: :math:`\bar A = -A^{-T} \bar X A^{-T}` for :math:`X = A^{-1}`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aq_lightning.kernels.elimination import eliminate

Method = Literal["lu", "mixed", "newton", "normal", "pivoted"]
"""How :func:`inverse` is computed."""

TOLERANCE = 1e-9
"""Greatest residual ``‖I − A X‖∞`` at which ``X`` passes for the inverse."""
MIXED_TOLERANCE = 1e-4
"""The same of method ``mixed``: what products with ``X`` of 11 significant bits do not see."""
_LEAF = 64  # size up to which one call of the library, or of the kernel, is fastest
_STEPS = 5  # of Newton's iteration: from a residual of 0.3, what one optimizer step leaves, to rounding
_COARSE = 3  # the same, to the rounding of products of 11 significant bits
_COARSE_ROUNDING = 2.0**-10  # of both factors of such a product


def inverse(
    matrix: Tensor, method: Method = "lu", start: Tensor | None = None, wait: bool = True
) -> tuple[Tensor, Tensor]:
    """Inverse of each matrix and how far it is from one.

    Args:
        matrix: float64 (…, size, size).
        method: ``lu``, elimination without pivoting, which strictly diagonally dominant matrices do not need;
            ``newton``, ``X ← X + X (I − A X)`` from ``start``; ``mixed``, the same with float32 products, TensorFloat32
            if torch lets them be, but for the last residual: the least work for one large matrix; ``normal``,
            ``(Aᵀ A)⁻¹ Aᵀ`` with elimination, which positive definite matrices allow, and one of Newton's steps, for
            condition numbers up to about 10⁵; ``pivoted``, for any matrix, as torch.linalg.inv. CUDA graphs can record
            all but the last.
        start: where Newton's iteration starts, an inverse of almost this matrix, shape of ``matrix``.
        wait: whether to look at the residual and, where it is beyond :data:`TOLERANCE`, to invert with pivoting. Costs
            nothing on a CPU; on a GPU the host waits for the device.

    Returns:
        ``X``, shape of ``matrix``, differentiable once in ``matrix``; and ``‖I − A X‖∞``, a bound on it for ``mixed``,
        the worst, a scalar.
    """
    return _inverse(matrix, start, method, wait)


@torch.library.custom_op(
    "aq_lightning::inverse",
    mutates_args=(),
    schema="(Tensor matrix, Tensor? start, str method, bool wait) -> (Tensor, Tensor)",
)
def _inverse(matrix: Tensor, start: Tensor | None, method: str, wait: bool) -> tuple[Tensor, Tensor]:
    if method == "mixed":
        found, residual = _mixed(matrix, start)
    elif method == "pivoted":
        found = torch.linalg.inv_ex(matrix).inverse
    elif method == "newton":
        found = _newton(matrix, start, _STEPS)
    elif method == "normal":
        found = _newton(matrix, _eliminated(matrix.mT @ matrix) @ matrix.mT, 1)
    else:
        found = _eliminated(matrix)
    residual = residual if method == "mixed" else _residual(matrix, found)
    if wait and method != "pivoted" and not bool(residual <= tolerance(method)):
        found = torch.linalg.inv_ex(matrix).inverse
        residual = _residual(matrix, found)
    return found.contiguous(), residual


@_inverse.register_fake
def _(matrix: Tensor, start: Tensor | None, method: str, wait: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format), matrix.new_empty(())


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0])
    ctx.dtype = torch.float32 if inputs[2] == "mixed" else torch.float64


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found, gradient = ctx.saved_tensors[0].to(ctx.dtype), gradient.to(ctx.dtype)
    return -(found.mT @ gradient @ found.mT).double(), None, None, None


_inverse.register_autograd(_backward, setup_context=_keep)


def tolerance(method: Method) -> float:
    """Greatest residual at which a method's result passes for the inverse."""
    return MIXED_TOLERANCE if method == "mixed" else TOLERANCE


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


def _mixed(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    r"""Schulz's iteration in float32, refined once; and a bound on the residual it leaves.

    From the residual :math:`R = I - A X` in float64, :math:`X + X R` with an error of at most
    :math:`ε |X| |R|` in its product leaves at most :math:`‖R‖^2 + ε ‖\, |A| |X| \,‖ ‖R‖`.
    """
    found = _newton(matrix.float(), start.float(), _COARSE).double()
    defect = _defect(matrix, found)
    refined = found + (found.float() @ defect.float()).double()
    r, x = (torch.linalg.vector_norm(each, 1, dim=-1) for each in (defect, found))  # (…, size)
    ax = (matrix.abs() @ x[..., None]).amax((-2, -1))  # ‖ |A| |X| ‖, (…)
    r = r.amax(-1)
    return refined, (r * (r + _COARSE_ROUNDING * ax)).amax()


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
