r"""Gradient descent over orthogonal matrices along Cayley's map (Li, Fuxin and Todorovic, arXiv 2002.01113), by which
SpinQuant (arXiv 2405.16406) learns its rotations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from aq_lightning.errors import RequestError


class CayleySGD(Optimizer):
    r"""For an orthogonal R and the gradient G of the loss,

    .. math:: R ← (I + \tfrac{α}{2} Y)^{-1} (I - \tfrac{α}{2} Y)\, R, \qquad Y = \tfrac12 (G R^T - R G^T).

    Y is skew, so its Cayley transform is orthogonal and R stays so: the paper's projection
    :math:`G R^T - \tfrac12 R R^T G R^T`, made skew, is half as long as Y for a square R. The system is solved exactly
    instead of by a few fixed-point steps, whose bound on the step is kept, for it is also what keeps steps small where
    the gradient is large: :math:`α = \min(η, 1 / \|Y\|_1)`. No momentum.

    Args:
        params: orthogonal matrices (…, n, n), each with a step of its own.
        lr: step size η.
    """

    def __init__(self, params: Iterable, lr: float = 1.5) -> None:
        if not lr >= 0:
            raise RequestError(f"A step size is 0 or more, got {lr}: try 1.5.")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; ``closure``, if given, computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for rotation in (each for each in group["params"] if each.grad is not None and each.numel()):
                rotation.copy_(turned(rotation, rotation.grad, float(group["lr"])))
        return loss


def turned(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Orthogonal matrices after a step of :class:`CayleySGD`, (…, n, n) each."""
    outer = gradient.to(rotation.dtype) @ rotation.mT
    skew = (outer - outer.mT) / 2
    longest = torch.linalg.matrix_norm(skew, 1)[..., None, None].clamp(min=torch.finfo(skew.dtype).tiny)
    half = skew * (rate * torch.ones_like(longest)).minimum(1 / longest) / 2
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(unit + half, rotation - half @ rotation)
