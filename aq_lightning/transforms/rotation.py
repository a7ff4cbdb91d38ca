"""An orthogonal matrix for the stream between blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Architecture
from aq_lightning.transforms.hadamard import hadamard
from aq_lightning.transforms.kronecker import divided
from aq_lightning.transforms.online import kronecker_product
from aq_lightning.transforms.parametrizations import matrices


@dataclass(frozen=True)
class Rotation:
    """Which orthogonal matrix."""

    kind: Literal["hadamard", "random"] = "hadamard"
    """``hadamard``: random signs times a Hadamard matrix, two small ones multiplied; ``random``: Haar's measure."""
    seed: int = 0
    """Of the signs, or of the matrix."""

    def check(self, architecture: Architecture, width: int) -> None:
        """
        Raises:
            RequestError: the model's stream cannot be rotated, or no Hadamard matrix has its width.
        """
        if not architecture.final_norm:
            raise RequestError(
                "A rotated stream has RMS norms alone and is written by linears alone, which is not so in this model: "
                "leave out model.rotation."
            )
        if self.kind == "hadamard":
            divided(width, "hadamard")

    def __call__(self, x: Tensor) -> Tensor:
        """``x ↦ x Q``, (…, width) → the same, in float64."""
        x, width = x.double(), x.shape[-1]
        if self.kind == "random":
            return x @ matrices(1, width, "fixed", "random", self.seed)()[0][0].to(x.device)
        generator = torch.Generator().manual_seed(self.seed)
        signs = 2 * torch.randint(2, (width,), generator=generator).double() - 1
        left, right = (hadamard(size).to(x.device) for size in divided(width, "hadamard"))
        return kronecker_product(x * signs.to(x.device), left, right)
