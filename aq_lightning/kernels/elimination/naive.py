"""Gauss–Jordan elimination in plain PyTorch: what the kernel must compute."""

from __future__ import annotations

from torch import Tensor


def eliminate(matrix: Tensor) -> Tensor:
    """Inverse of each matrix, (…, size, size) → the same, in ``size`` steps without pivoting.

    Step ``k`` solves equation ``k`` for unknown ``k`` and puts it into all others.
    """
    found = matrix.clone()
    for k in range(matrix.shape[-1]):
        row, column = found[..., k, :].clone(), found[..., :, k].clone()  # (…, size) each
        pivot = 1 / row[..., k, None]
        row, column[..., k] = row * pivot, 0
        row[..., k] = pivot[..., 0]
        found[..., :, k] = 0
        found -= column[..., :, None] * row[..., None, :]
        found[..., k, :] = row
    return found
