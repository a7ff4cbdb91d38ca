r"""Invertible matrices and how they are trained: free, orthogonal, by triangles, by singular values, or not at all.

Each form hands out its matrices and their inverses, float64 (blocks, size, size), and starts at the matrices given,
which all but the free one and that of triangles need to be orthogonal.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.transforms.hadamard import hadamard, has_hadamard
from aq_lightning.transforms.inverse import inverse

Form = Literal["free", "orthogonal", "ldu", "svd", "fixed"]
"""``free``: every entry is trained, inverted with pivoting. ``orthogonal``: Cayley's map of a skew matrix. ``ldu``:
unit triangles around a positive diagonal. ``svd``: two orthogonal matrices around positive singular values, FlatQuant's
default. ``fixed``: nothing is trained."""
Start = Literal["identity", "random", "hadamard", "flat"]
"""``random``: orthogonal, uniformly distributed (Haar's measure); ``hadamard``: all entries equally great, refused for
sizes without such a matrix; ``flat``: that where there is one, random elsewhere."""


class Free(nn.Module):
    """Every entry is a parameter."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(start.clone())

    def stretch(self, by: Tensor) -> None:
        """Multiplies the start from the left, (size, size)."""
        self.matrix.copy_(by @ self.matrix)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.matrix, _inverted(self.matrix)


class Orthogonal(nn.Module):
    r""":math:`(I - S)(I + S)^{-1} Q_0` with S skew, which starts at 0: orthogonal at every step, one inverse each."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.skew = nn.Parameter(torch.zeros_like(start))
        self.register_buffer("origin", start.clone())

    def forward(self) -> tuple[Tensor, Tensor]:
        matrix = _cayley(self.skew) @ self.origin
        return matrix, matrix.mT


class LDU(nn.Module):
    r""":math:`L \, \mathrm{diag}(e^d) \, U A_0`, L and U unit triangular: the determinant :math:`e^{Σd}` is not 0."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros_like(start))
        self.upper = nn.Parameter(torch.zeros_like(start))
        self.log_diagonal = nn.Parameter(start.new_zeros(start.shape[:-1]))  # (blocks, size)
        self.register_buffer("origin", start.clone())

    def stretch(self, by: Tensor) -> None:
        """Multiplies the start from the left, (size, size)."""
        self.origin.copy_(by @ self.origin)

    def forward(self) -> tuple[Tensor, Tensor]:
        unit = torch.eye(self.lower.shape[-1], dtype=self.lower.dtype, device=self.lower.device)
        lower, upper = self.lower.tril(-1) + unit, self.upper.triu(1) + unit
        matrix = (lower * self.log_diagonal.exp()[:, None]) @ upper @ self.origin
        return matrix, _inverted(matrix)


class SVD(nn.Module):
    r""":math:`U \, \mathrm{diag}(e^s) \, V^T`, U and V by Cayley's map; U starts at the matrix given, V and s at 1.

    FlatQuant trains s itself, which may cross 0.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.left = Orthogonal(start)
        self.right = Orthogonal(torch.eye(start.shape[-1], dtype=start.dtype).expand_as(start))
        self.log_singular = nn.Parameter(start.new_zeros(start.shape[:-1]))  # (blocks, size)

    def forward(self) -> tuple[Tensor, Tensor]:
        (left, left_inverse), (right, right_inverse) = self.left(), self.right()
        values = self.log_singular.exp()[:, None]  # (blocks, 1, size)
        return (left * values) @ right_inverse, (right / values) @ left_inverse


class Fixed(nn.Module):
    """Orthogonal matrices that stay as they start."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("origin", start.clone())

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.origin, self.origin.mT


_FORMS = {"free": Free, "orthogonal": Orthogonal, "ldu": LDU, "svd": SVD, "fixed": Fixed}


def matrices(blocks: int, size: int, form: Form, start: Start, seed: int = 0) -> nn.Module:
    """A module whose answer is (matrices, inverses), float64 (blocks, size, size) each.

    Args:
        blocks, size: how many, and their side.
        form: how they are trained.
        start: where they start, all alike.
        seed: of random ones.

    Raises:
        RequestError: an unknown form or start, or no Hadamard matrix of that size.
    """
    if form not in _FORMS or start not in get_args(Start):
        raise RequestError(
            f"A matrix is trained as {', '.join(_FORMS)} and starts at {', '.join(get_args(Start))}, got {form!r} and "
            f"{start!r}: try free and random."
        )
    return _FORMS[form](_start(size, start, seed).expand(blocks, -1, -1))


def _start(size: int, start: Start, seed: int) -> Tensor:
    """(size, size), orthogonal."""
    if start == "identity" or size == 0:
        return torch.eye(size, dtype=torch.float64)
    if start == "random" or start == "flat" and not has_hadamard(size):
        generator = torch.Generator().manual_seed(seed)
        orthogonal, triangle = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        return orthogonal * triangle.diagonal().sign()  # makes QR's answer unique, hence Haar-distributed
    if not has_hadamard(size):
        raise RequestError(
            f"No Hadamard matrix of order {size} is known here, as for 1, 2 and most multiples of 4: start at random."
        )
    return hadamard(size)


def _inverted(matrix: Tensor) -> Tensor:
    """In training by what graphs can record; where nothing is trained, with pivoting."""
    method = "normal" if torch.is_grad_enabled() else "pivoted"
    return inverse(matrix, method, wait=not matrix.is_cuda)[0]


def _cayley(skew: Tensor) -> Tensor:
    """``(I − S)(I + S)⁻¹ = 2 (I + S)⁻¹ − I`` of the skew part S."""
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return 2 * _inverted(unit + skew - skew.mT) - unit
