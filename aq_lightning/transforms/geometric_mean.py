r"""The point between two positive definite matrices that sees both alike.

:math:`W \# X^{-1} = X^{-½} (X^{½} W X^{½})^{½} X^{-½}` is the one positive definite G with :math:`G X G = W`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 1e-2  # of each matrix's mean diagonal: what was hardly seen is hardly stretched


def geometric_mean(weights: Tensor, read: Tensor) -> Tensor:
    """``W # X⁻¹`` of two symmetric matrices, damped and scaled to determinant 1; float64 (size, size)."""
    weights, read = _damped(weights), _damped(read)
    root, inverse = _power(read, 0.5), _power(read, -0.5)
    mean = inverse @ _power(root @ weights @ root, 0.5) @ inverse
    return mean / torch.linalg.slogdet(mean).logabsdet.div(len(mean)).exp()


def inverse_root(matrix: Tensor) -> Tensor:
    """``G^{-½}`` of a symmetric positive definite matrix."""
    return _power(matrix, -0.5)


def _damped(matrix: Tensor) -> Tensor:
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    mean = matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    return matrix / mean + _DAMPING * unit


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp(min=torch.finfo(values.dtype).tiny) ** exponent) @ vectors.mT
