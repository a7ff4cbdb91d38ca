r"""The convention, written once.

Row vectors and torch's layout, :math:`y = x W^T + b` with W of shape (out, in). At the input of a linear

.. math:: x' = (x - δ) A^{-1}, \qquad W' = W A^T, \qquad b' = b + W δ,

hence :math:`x' W'^T + b' = x W^T + b` exactly. A transform is an ordered list of factors, each an invertible map
whose two directions are all that training, merging and export ever use: ``inverse`` on activations (and on whatever
produces them) and ``transpose`` on the weights that read them. The inverse of an online factor multiplies the
activation at run time; all others fold. Parameters are float64; a map is handed out in the precision that its user asks
for, its inverse always computed in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Group, SiteShape
from aq_lightning.transforms.online import Operation

_SQUARINGS = 30  # of a matrix whose greatest eigenvalue is sought


class Map(NamedTuple):
    """Both directions of ``x' = (x − δ) A⁻¹``; each acts on the last dimension, (…, channels) → (…, channels)."""

    inverse: Callable[[Tensor], Tensor]
    """``x ↦ x A⁻¹``."""
    transpose: Callable[[Tensor], Tensor]
    """``w ↦ w Aᵀ``."""
    shift: Callable[[int], Tensor] | None = None
    """Number of channels ↦ δ over them, (channels); None: no shift."""
    folded: Callable[[Tensor], Tensor] | None = None
    """The part of ``inverse`` that acts on whatever produces x; None: all of it."""
    folded_transpose: Callable[[Tensor], Tensor] | None = None
    """The part of ``transpose`` that acts on what produces the other side of a product, keys; None: all of it."""
    online: tuple[Mapping[str, Tensor], ...] = ()
    """Tensors of the operations that are the rest of ``inverse``, in order."""
    diagonal: bool = False
    """Whether A only scales channels: both directions then act on a vector of scales as on any row."""


@dataclass(frozen=True)
class SiteStatistics:
    """What is known of a site before training, per channel of the site; each tensor float64 (blocks, size)."""

    low: Tensor
    """Least activation over all calibration tokens (and over the query group)."""
    high: Tensor
    """Greatest activation."""
    mean: Tensor
    """Mean activation."""
    magnitude: Tensor
    """Mean of its absolute value."""
    weight_max: Tensor
    """Greatest ``|W|`` over the output rows of all consumers."""


class Factor(nn.Module, ABC):
    """One invertible map with trainable parameters. Subclasses are final: one constructor, three methods.

    Adding a transform is one file with one subclass; recipes name it by ``class_path`` and pass every constructor
    argument but ``shape``.
    """

    group: ClassVar[Group]
    """Group of maps that this factor ranges over; a site that does not absorb it refuses the factor."""
    shape: SiteShape
    """Blocks of channels that it mixes."""
    searches: ClassVar[bool] = False
    """Whether it starts by :meth:`search`."""
    balances: bool = False
    """Whether it starts by :meth:`balance`."""
    online: bool = False
    """Whether ``A⁻¹`` multiplies the activation at run time, at a cost, and so fits any site with consumers."""
    rounds: ClassVar[bool] = False
    """Whether it is a part of rounding activations instead of an equivalence."""
    written_out: ClassVar[bool] = True
    """Whether A is small enough to be written out, for the condition number of a product."""

    @abstractmethod
    def initialize(self, statistics: SiteStatistics) -> None:
        """Sets the parameters from what is known of the site; not called for sites without consumers."""

    @abstractmethod
    def forward(self, dtype: torch.dtype) -> Map:
        """The map at the present parameters, differentiable, in ``dtype``."""

    @abstractmethod
    def condition(self) -> Tensor:
        """Condition number of ``A`` in the spectral norm, the worst over blocks; float64 scalar, 1 at best."""

    def search(self, error: Callable[[], float]) -> None:
        """Chooses where to start by trying; called after :meth:`initialize` iff ``searches``.

        Args:
            error: of what the site's consumers answer with rounded weights, at the parameters that the factor has when
                it is called.
        """

    def balance(self, read: Tensor, weights: Tensor) -> None:
        """Starts from second moments; called after :meth:`initialize` iff ``balances``.

        Args:
            read: E[xᵀ x] of what the site's consumers read at the factor's present parameters, float64 (channels,
                channels).
            weights: Wᵀ W of all consumers, as they read it, the same shape.
        """

    def operation(self) -> Operation | None:
        """What the factor does at run time if it is online, its tensors on the meta device; None: it only folds."""
        return None


class Transform(nn.Module):
    """The factors of one site, applied to activations in the order given: ``x' = (x − δ) A₁⁻¹ A₂⁻¹ …``.

    Online ones are the last: they act on what the producer, with all others folded into it, answers.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        super().__init__()
        late = [type(factor).__name__ for factor in factors[1:] if factor.group is Group.SHIFT]
        if late:
            raise RequestError(f"A shift must be the first factor of its transform, got {late[0]} later: move it up.")
        late = [type(b).__name__ for a, b in pairwise(factors) if a.online and not b.online]
        if late:
            raise RequestError(f"What folds comes before what is online, got {late[0]} behind an online factor: "
                               "move it up.")  # fmt: skip
        self.factors = nn.ModuleList(factors)

    def initialize(self, statistics: SiteStatistics) -> None:
        """Initializes every factor."""
        for factor in self.factors:
            factor.initialize(statistics)

    def forward(self, dtype: torch.dtype) -> Map:
        """The composed map in ``dtype``."""
        maps = [factor(dtype) for factor in self.factors]

        inverse = _chain([each.inverse for each in maps])
        transpose = _chain([each.transpose for each in maps])
        folded = _chain([each.inverse for each in maps if not each.online])
        folded_transpose = _chain([each.transpose for each in maps if not each.online])
        online = tuple(tensors for each in maps for tensors in each.online)
        diagonal = all(each.diagonal for each in maps)
        return Map(inverse, transpose, maps[0].shift if maps else None, folded, folded_transpose, online, diagonal)

    def online(self) -> list[Factor]:
        """The factors that act at run time."""
        return [factor for factor in self.factors if factor.online]

    def condition(self) -> Tensor:
        """Condition number of ``A₁ A₂ …`` in the spectral norm, the worst over blocks; float64 scalar, 1 at best.

        Of factors whose blocks differ, or that are not written out, it is the product of their own, a bound.
        """
        mixing = [factor for factor in self.factors if factor.group is not Group.SHIFT]
        written_out = all(factor.written_out for factor in mixing)
        if written_out and len(mixing) > 1 and len({factor.shape for factor in self.factors}) == 1:
            return condition_number(self.explicit())
        product = torch.ones((), dtype=torch.float64)
        for factor in mixing:
            product = product * factor.condition().cpu()
        return product

    @torch.no_grad()
    def explicit(self) -> Tensor:
        """``A₁ A₂ …`` itself, of factors whose blocks are the same; float64 (blocks, size, size)."""
        shape = self.factors[0].shape
        device = next(self.parameters()).device
        unit = torch.eye(shape.size, dtype=torch.float64, device=device)  # one row of each block at a time
        columns = self(torch.float64).transpose(unit.repeat(1, shape.blocks))  # I Aᵀ, (size, blocks · size)
        return shape.split(columns)[:, :, 0].permute(1, 2, 0)


def condition_number(matrix: Tensor) -> Tensor:
    """The worst of (…, size, size) in the spectral norm; infinite if anything is not finite."""
    if not bool(torch.isfinite(matrix).all()):
        return matrix.new_tensor(float("inf"))
    return torch.linalg.cond(matrix).max() if matrix.device.type == "cpu" else condition_by_products(matrix).max()


def condition_by_products(matrix: Tensor) -> Tensor:
    """``‖A‖₂ ‖A⁻¹‖₂`` of each of (…, size, size) → (…), infinite where there is no inverse.

    A GPU computes the singular values of one matrix after another, but multiplies all at once.
    """
    inverse, failed = torch.linalg.inv_ex(matrix.double())
    condition = _spectral_norm(matrix.double()) * _spectral_norm(inverse)
    return condition.masked_fill(failed != 0, float("inf")).nan_to_num(nan=float("inf"), posinf=float("inf"))


def _spectral_norm(matrix: Tensor) -> Tensor:
    """``‖A‖₂`` of each of (…, size, size) → (…): the root of ``ρ(G) = lim tr(Gᵐ)^(1/m)`` for ``G = Aᵀ A``, which at
    ``m = 2³⁰`` is too great by ``ln(size) / m``, relatively."""
    size = matrix.abs().amax((-2, -1))  # (…); so that squares neither overflow nor vanish
    matrix, logarithm = matrix / size[..., None, None], 2 * size.log()
    power = matrix.mT @ matrix
    for exponent in range(_SQUARINGS + 1):
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)  # (…)
        logarithm = logarithm + trace.log() / 2**exponent
        power = power / trace[..., None, None]
        power = power @ power
    return (logarithm / 2).exp()


def _chain(functions: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """One function after the other."""

    def chained(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return chained


FactorFactory = Callable[[SiteShape], Factor]
"""A factor with every argument but its shape given: what a recipe holds."""
