r"""Hadamard matrices: entries ±1, :math:`H H^T = n I`. Of order 1, 2, and every :math:`2^k m` with a Paley core.

Sylvester doubles (:math:`H_2 \otimes H`); Paley (1933) makes a core from the squares of a finite field of q elements:
order q + 1 if q ≡ 3 mod 4, order 2 (q + 1) if q ≡ 1. That covers the widths of published models: 12, 20, 28, 36, 44,
60, 76, 108, 140, 148, 344 and others times powers of two. Whoever needs another width takes another start.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

_GREATEST_CORE = 1024
_DEGREES = (1, 2, 3)  # of fields: a polynomial of degree 2 or 3 without roots has no factors


@cache
def has_hadamard(size: int) -> bool:
    """Whether :func:`hadamard` knows a matrix of this order."""
    return size in (1, 2) or size > 0 and (_core(size) is not None or size % 2 == 0 and has_hadamard(size // 2))


def hadamard(size: int) -> Tensor:
    """A Hadamard matrix over √size, hence orthogonal; float64 (size, size). Ask :func:`has_hadamard` first."""
    return _signs(size) / size**0.5


@cache
def _signs(size: int) -> Tensor:
    """Entries ±1."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size == 2:
        return pair
    core = _core(size)
    if core is None:
        return torch.kron(pair, _signs(size // 2))
    field, symmetric = core
    count = size // 2 if symmetric else size
    jacobsthal = _jacobsthal(*field)  # χ(a − b), (q, q)
    bordered = torch.zeros(count, count, dtype=torch.float64)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, 1 if symmetric else -1, jacobsthal
    unit = torch.eye(count, dtype=torch.float64)
    if symmetric:  # Paley II
        return torch.kron(bordered, pair) + torch.kron(unit, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double())
    return bordered + unit  # Paley I


def _core(size: int) -> tuple[tuple[int, int], bool] | None:
    """The field (prime, degree) of a Paley matrix of this order, and whether it is of the second kind."""
    if size % 4 or size > _GREATEST_CORE:
        return None
    first, second = _field(size - 1), _field(size // 2 - 1)
    if first is not None:
        return first, False
    return (second, True) if second is not None and (size // 2 - 1) % 4 == 1 else None


def _field(order: int) -> tuple[int, int] | None:
    """Prime and degree of the field of ``order`` elements, if there is one of odd order."""
    for degree in _DEGREES:
        prime = round(order ** (1 / degree))
        if prime**degree == order and prime > 2 and all(prime % d for d in range(2, int(prime**0.5) + 1)):
            return prime, degree
    return None


def _jacobsthal(prime: int, degree: int) -> Tensor:
    """χ(a − b) for all elements a, b of a field: 0 on the diagonal, 1 where a − b is a square, −1 elsewhere."""
    elements = list(product(range(prime), repeat=degree))  # coefficients, the constant last
    modulus = next(m for m in elements if not any(_value((1, *m), x, prime) == 0 for x in range(prime)) or degree == 1)
    squares = {_square(each, modulus, prime) for each in elements if any(each)}
    sign = torch.tensor([0 if not any(e) else 1 if e in squares else -1 for e in elements], dtype=torch.float64)
    digits = torch.tensor(elements)  # (q, degree)
    difference = (digits[:, None] - digits) % prime  # (q, q, degree)
    weights = torch.tensor([prime**k for k in reversed(range(degree))])
    return sign[(difference * weights).sum(-1)]


def _value(polynomial: tuple[int, ...], x: int, prime: int) -> int:
    value = 0
    for coefficient in polynomial:
        value = (value * x + coefficient) % prime
    return value


def _square(element: tuple[int, ...], modulus: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """``element²`` modulo the monic polynomial whose lower coefficients are ``modulus``."""
    degree = len(element)
    if degree == 1:
        return (element[0] ** 2 % prime,)
    result = (0,) * degree
    for coefficient in element:  # Horner: result · t + coefficient · element
        carry = result[0]
        shifted = (*result[1:], 0)
        result = tuple(
            (s - carry * m + coefficient * e) % prime for s, m, e in zip(shifted, modulus, element, strict=True)
        )
    return result
