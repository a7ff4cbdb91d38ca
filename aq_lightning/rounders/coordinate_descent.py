"""Code by code towards the least output error."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.qtensor import QTensor, decode, encode
from aq_lightning.rounders.base import Moments, Nearest, Rounder, spread


class CoordinateDescent(Rounder):
    r"""Sweeps over the columns, each rounded anew to what is best while all others stay (QuantEase, arXiv 2309.01885).

    With :math:`R = W - \hat W` the error :math:`\mathrm{tr}(R H R^T)` is least for :math:`\hat w_j + (R H)_j / H_{jj}`;
    on a uniform grid its nearest code is the best one, so no step ever raises the error.

    Args:
        before: the rounder whose codes are improved.
        sweeps: passes over all columns, fewer if one changes nothing.
        damping: part of the mean of H's diagonal that is added to it.
    """

    def __init__(self, before: Rounder | None = None, sweeps: int = 4, damping: float = 0.01) -> None:
        if sweeps < 1 or damping < 0:
            raise RequestError(
                f"Coordinate descent makes 1 sweep or more with damping of 0 or more, got {sweeps} and {damping}: "
                "use 4 and 0.01."
            )
        self.before = before or Nearest()
        self.sweeps = sweeps
        self.damping = damping

    @property
    def asymmetric(self) -> bool:
        return self.before.asymmetric

    @torch.no_grad()
    def round(self, weight: Tensor, start: QTensor, moments: Moments) -> QTensor:
        start = self.before.round(weight, start, moments)
        hessian = moments.damped(self.damping)
        scale, zero = spread(start)
        codes = start.codes.double()
        slope = (weight - decode(codes, scale, zero)) @ hessian  # R H, (out, in)
        for _ in range(self.sweeps):
            before = codes.clone()
            for j in range(weight.shape[1]):
                value = decode(codes[:, j], scale[:, j], zero[:, j])  # (out), like all below
                codes[:, j] = encode(value + slope[:, j] / hessian[j, j], scale[:, j], zero[:, j], start.grid)
                change = decode(codes[:, j], scale[:, j], zero[:, j]) - value
                slope -= change[:, None] * hessian[j]
            if torch.equal(codes, before):
                break
        return replace(start, codes=codes.to(torch.uint8))
