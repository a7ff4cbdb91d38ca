"""Descent by the sign of the gradient (arXiv 1802.04434)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

from aq_lightning.errors import RequestError


class SignSGD(Optimizer):
    r""":math:`θ ← θ − η\, \mathrm{sign}(g)`: every entry moves by the step size, whatever its gradient; no state.

    SignRound (arXiv 2309.05516) trains roundings with it: with a step size of 1 / steps that decays linearly, an
    offset can just reach ±½.

    Args:
        params: parameters or parameter groups.
        lr: step size η.
    """

    def __init__(self, params: Iterable, lr: float = 5e-3) -> None:
        if not lr >= 0:
            raise RequestError(f"A step size is 0 or more, got {lr}: try 5e-3, one in 200 steps.")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step; ``closure``, if given, computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-float(group["lr"]))
        return loss
