"""GPTQ (arXiv 2210.17323) and its asymmetric form, GPTAQ (arXiv 2504.02692)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.qtensor import QTensor, decode, encode
from aq_lightning.rounders.base import Moments, Rounder, spread


class GPTQ(Rounder):
    r"""Rounds column after column; the columns that follow make up for the error of each.

    With :math:`H^{-1} = U^T U`, U upper triangular, and the columns in order, of column j

    .. math:: e = (w_j - \hat w_j) / U_{jj}, \qquad W_{:, j:} ← W_{:, j:} - e\, U_{j, j:} + a\, w_j P_{j, j:},

    where :math:`P = \mathrm{triu}(D U^T, 1)\, U` answers for inputs that differ from the full-precision model's (D, see
    :class:`Moments`). The grid is that of the unchanged weight (static groups), so the order needs no trace in the
    checkpoint. A channel that is always 0 keeps its nearest codes; the published code sets its weights to 0.

    Args:
        act_order: whether the columns that meet the greatest activations come first.
        damping: part of the mean of H's diagonal that is added to it.
        block: columns after which the others are updated; the result does not depend on it.
        asymmetry: a; 0 is GPTQ, 0.25 the released GPTAQ, 1 its paper's formula.
    """

    def __init__(self, act_order: bool = True, damping: float = 0.01, block: int = 128, asymmetry: float = 0.0) -> None:
        if not damping > 0:
            raise RequestError(f"GPTQ.damping is above 0, or H may have no inverse, got {damping}: use 0.01.")
        if block < 1:
            raise RequestError(f"GPTQ.block has 1 column or more, got {block}: use 128.")
        if not 0 <= asymmetry <= 1:
            raise RequestError(f"GPTQ.asymmetry lies in [0, 1], got {asymmetry}: 0.25 is GPTAQ, 0 is GPTQ.")
        self.act_order = act_order
        self.damping = damping
        self.block = block
        self.asymmetry = asymmetry

    @property
    def asymmetric(self) -> bool:
        return self.asymmetry > 0

    @torch.no_grad()
    def round(self, weight: Tensor, start: QTensor, moments: Moments) -> QTensor:
        diagonal = moments.second.diagonal()
        order = torch.arange(len(diagonal), device=diagonal.device)
        if self.act_order:
            order = diagonal.argsort(descending=True, stable=True)
        hessian = moments.damped(self.damping)[order][:, order]
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)  # U
        answering = self._answering(moments.asymmetry, order, upper)  # a P
        scale, zero = (each[:, order] for each in spread(start))
        remaining, codes = weight[:, order].clone(), torch.empty_like(weight)  # (out, in) each
        for first in range(0, weight.shape[1], self.block):
            last = min(first + self.block, weight.shape[1])
            errors = torch.zeros_like(remaining[:, first:last])
            for j in range(first, last):
                w, s, z = remaining[:, j], scale[:, j], zero[:, j]  # (out) each
                codes[:, j] = encode(w, s, z, start.grid)
                errors[:, j - first] = (w - decode(codes[:, j], s, z)) / upper[j, j]
                remaining[:, j + 1 : last] -= errors[:, j - first, None] * upper[j, j + 1 : last]
                if answering is not None:
                    remaining[:, j + 1 : last] += w[:, None] * answering[j, j + 1 : last]
            remaining[:, last:] -= errors @ upper[first:last, last:]
            if answering is not None:
                remaining[:, last:] += remaining[:, first:last] @ answering[first:last, last:]
        return replace(start, codes=torch.empty_like(codes).index_copy_(1, order, codes).to(torch.uint8))

    def _answering(self, asymmetry: Tensor | None, order: Tensor, upper: Tensor) -> Tensor | None:
        if asymmetry is None or not self.asymmetry:
            return None
        return self.asymmetry * (asymmetry[order][:, order] @ upper.T).triu(1) @ upper
