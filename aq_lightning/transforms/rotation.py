"""Orthogonal matrices for the stream between blocks, and inside the heads of values."""

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
class RotationTraining:
    """How rotations are learnt on the loss of the whole model, before blocks are calibrated (SpinQuant, arXiv
    2405.16406): one of the stream between blocks, and one in each block of its value heads. Activations, keys and
    values are rounded meanwhile, weights are not."""

    steps: int = 100
    """Optimizer steps."""
    rate: float = 1.5
    """First step size of :class:`aq_lightning.optimizers.CayleySGD`; it falls to 0 along a line."""
    batch_size: int = 8
    """Windows of text to a step."""
    objective: Literal["tokens", "divergence"] = "tokens"
    """``tokens``: cross-entropy of the text's next token; ``divergence``: KL from the full-precision model's
    distribution to the rounded one's."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not 0 < self.rate < float("inf"):
            raise RequestError(
                "Rotations are trained in 1 step or more of 1 window or more, at a finite step size above 0, got "
                f"{self.steps} steps of {self.batch_size} at {self.rate}: try 100 of 8 at 1.5."
            )


@dataclass(frozen=True)
class Rotation:
    """Which orthogonal matrix."""

    kind: Literal["hadamard", "random"] = "hadamard"
    """``hadamard``: random signs times a Hadamard matrix, two small ones multiplied; ``random``: Haar's measure."""
    seed: int = 0
    """Of the signs, or of the matrix."""
    training: RotationTraining | None = None
    """How it is learnt, and others inside the heads of values with it; null: it stays as it starts."""

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
        signs = _signs((width,), self.seed)
        left, right = (hadamard(size).to(x.device) for size in divided(width, "hadamard"))
        return kronecker_product(x * signs.to(x.device), left, right)

    def of_heads(self, blocks: int, size: int) -> Tensor:
        """Where the matrices inside value heads start to be learnt: random signs times a Hadamard matrix, or a random
        matrix where there is none; float64 (blocks, size, size)."""
        core = matrices(1, size, "fixed", "flat", self.seed)()[0]
        return _signs((blocks, size), self.seed + 1)[..., None] * core


@dataclass(frozen=True)
class LearnedRotation:
    """What :class:`RotationTraining` came to."""

    stream: Tensor
    """Q, float64 (width, width)."""
    values: Tensor
    """Of each block's value heads, float64 (blocks, size, size); no blocks where heads cannot be rotated."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x ↦ x Q``, (…, width) → the same, in float64."""
        return x.double() @ self.stream.to(x.device)


def _signs(shape: tuple[int, ...], seed: int) -> Tensor:
    """±1 at random, float64."""
    return 2 * torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).double() - 1
