"""A Kronecker product ahead of a product with a packed weight, in plain PyTorch: what the kernel must compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aq_lightning.kernels.int4_int8_matmul import naive
from aq_lightning.qtensor import ends


class Kronecker(NamedTuple):
    """A map of n₁ n₂ channels, and how its result is cut before it is rounded."""

    left: Tensor
    """(n₁, n₁)."""
    right: Tensor
    """(n₂, n₂)."""
    clip: Tensor | None = None
    """(2): see :func:`clipped`; None: whole."""


def kronecker_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(…, n₁ · n₂) times ``left ⊗ right``, of (n₁, n₁) and (n₂, n₂): a row as a matrix X becomes ``leftᵀ X right``."""
    return (left.mT @ (x.unflatten(-1, (left.shape[0], right.shape[0])) @ right)).flatten(-2)


def clipped(x: Tensor, fractions: Tensor) -> Tensor:
    """(…, channels) cut to the first fraction of each row's least and the second of its greatest channel."""
    low, high = ends(x)  # (…, 1) each
    return torch.maximum(torch.minimum(x, high.clamp(min=0) * fractions[1]), low.clamp(max=0) * fractions[0])


def transformed(x: Tensor, by: Kronecker) -> Tensor:
    """(…, n₁ · n₂) → the same; both products and the clip are rounded to the dtype of x."""
    y = kronecker_product(x, by.left, by.right)
    return y if by.clip is None else clipped(y, by.clip)


def quantize(x: Tensor, by: Kronecker, bits: int) -> tuple[Tensor, Tensor]:
    """The transformed tokens as :func:`int4_int8_matmul.naive.quantize` rounds them: int8 (…, K), float32 (…, 1)."""
    return naive.quantize(transformed(x, by), bits)
