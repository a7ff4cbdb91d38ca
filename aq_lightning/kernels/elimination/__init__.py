"""Inverses of many small matrices at once, without pivoting: for matrices that are strictly diagonally dominant."""

from __future__ import annotations

from torch import Tensor

from aq_lightning.errors import RequestError

LARGEST = 128
"""Greatest size of a matrix: a program holds it in its registers."""


def eliminate(matrix: Tensor) -> Tensor:
    """:func:`naive.eliminate` by a kernel, on any device that Triton serves; CUDA graphs can record it.

    Raises:
        RequestError: the matrices are too large.
    """
    from aq_lightning.kernels.elimination import triton

    if matrix.shape[-1] > LARGEST:
        raise RequestError(f"Matrices are at most {LARGEST} wide, got {matrix.shape[-1]}: invert halves of them.")
    return triton.eliminate(matrix)
