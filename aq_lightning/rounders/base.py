"""What every rounder shares: a weight, its grid and what it reads in, codes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aq_lightning.qtensor import QTensor


@dataclass(frozen=True)
class Moments:
    """Means over the tokens that a weight reads; float64 (in, in) each."""

    second: Tensor
    r"""H, of :math:`\hat x^T \hat x` with the activations of the quantized model."""
    asymmetry: Tensor | None = None
    r"""D, of :math:`(x - \hat x)^T \hat x` with those x of the full-precision model; None: not known."""

    def damped(self, damping: float) -> Tensor:
        """H with ``damping`` times the mean of its diagonal added to it, and 1 for channels that are always 0."""
        diagonal = self.second.diagonal()
        diagonal = torch.where(diagonal > 0, diagonal, 1.0)
        return torch.diagonal_scatter(self.second, diagonal + damping * diagonal.mean())


class Rounder(ABC):
    """Chooses the codes of a folded weight on a given grid, block after block, after training. Subclasses are final."""

    reads: ClassVar[bool] = True
    """Whether it asks what the weight reads."""

    @property
    def asymmetric(self) -> bool:
        """Whether it asks for :attr:`Moments.asymmetry` too."""
        return False

    @abstractmethod
    def round(self, weight: Tensor, start: QTensor, moments: Moments) -> QTensor:
        """Other codes on the grid of ``start``.

        Args:
            weight: float64 (out, in).
            start: its codes, scales and zero points as the weight quantizer gives them.
            moments: of its input.
        """


class Nearest(Rounder):
    """The codes of the weight quantizer: to the nearer one, or as learnt."""

    reads: ClassVar[bool] = False

    def round(self, weight: Tensor, start: QTensor, moments: Moments) -> QTensor:
        return start


def spread(start: QTensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, float64 (out, in) each."""
    size = start.codes.shape[1] // start.scale.shape[1]
    scale, zero = (each.double().repeat_interleave(size, 1) for each in (start.scale, start.zero))
    return scale, zero
