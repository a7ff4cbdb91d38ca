"""Means with standard errors, and differences between means over the same units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Sample(Metric):
    """Values of independent units, such as windows of text or questions; computes their mean, float64 ().

    Over several processes the units of all are gathered.

    Args:
        options: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.add_state("kept", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Adds the values of further units, (units,) or ()."""
        self.kept.append(values.detach().reshape(-1).double())

    def compute(self) -> Tensor:
        return self.values().mean()

    def values(self) -> Tensor:
        """All values so far, float64 (units,)."""
        return dim_zero_cat(self.kept) if self.kept else torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Score:
    r"""A mean :math:`\bar x` over units, or its exponential, as perplexity is of the mean loss.

    Its standard error is :math:`s / \sqrt n` with :math:`s^2 = \sum (x - \bar x)^2 / (n - 1)`, times
    :math:`e^{\bar x}` for an exponential (the delta method).
    """

    values: Tensor
    """One for each unit, float64 (units,)."""
    exponential: bool = False

    @property
    def value(self) -> float:
        """The mean or its exponential; infinite where that overflows."""
        mean = self.values.mean()
        return float(mean.exp() if self.exponential else mean)

    @property
    def error(self) -> float:
        """Standard error; NaN for a single unit."""
        return _error(self._linear())

    def beyond(self, other: Score) -> tuple[float, float]:
        """How much greater this score is than another's over the same units, and the standard error of that.

        What makes a unit hard for both cancels: the error is that of the units' differences, far smaller than those of
        the two scores suggest.

        Raises:
            ValueError: the units are not as many.
        """
        if len(self.values) != len(other.values) or self.exponential != other.exponential:
            raise ValueError(f"Pairs are of the same units, got {len(self.values)} and {len(other.values)}.")
        return self.value - other.value, _error(self._linear() - other._linear())

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain data for JSON, which has neither NaN nor infinity."""
        return {"value": known(self.value), "error": known(self.error), "units": len(self.values)}

    def _linear(self) -> Tensor:
        """What each unit adds to the score, to first order, (units,)."""
        return self.values * self.value if self.exponential else self.values


def known(number: float) -> float | None:
    """The number itself; None in place of one that is not finite."""
    return number if math.isfinite(number) else None


def _error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
