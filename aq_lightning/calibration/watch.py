"""What can stop a window's training, and who was first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cause:
    """Why the training of a window was stopped."""

    block: int
    """Index in the model."""
    site: str
    """Site of the transform or name of the weight; empty: the whole block."""
    what: str
    """The quantity: ``loss``, ``condition number``, ``inverse``, or a parameter of the site."""
    value: float | None
    """What it had become; None: not finite."""
    epoch: int
    """When."""

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        place = f"block {self.block}, {self.site}" if self.site else f"block {self.block}"
        value = "not finite" if self.value is None else f"{self.value:.2e}"
        return f"{place}: {self.what} {value} in epoch {self.epoch}"


@dataclass(frozen=True)
class Quantity:
    """Something that each step computes and that must stay finite; the fields are those of :class:`Cause`."""

    block: int
    site: str
    what: str


class Watch:
    """Remembers which quantity was first not finite, without waiting for the device.

    Args:
        quantities: in the order in which a step computes them, so that what follows from another comes after it.
        device: theirs.
    """

    def __init__(self, quantities: Sequence[Quantity], device: torch.device) -> None:
        self.quantities = quantities
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        self.since = self.steps.new_full((len(quantities),), torch.inf)  # step in which each was first not finite

    def update(self, values: Sequence[Tensor]) -> None:
        """Takes in one scalar per quantity: a step has passed."""
        finite = torch.stack([value.double() for value in values]).isfinite()  # (quantities)
        self.since.copy_(torch.minimum(self.since, torch.where(finite, torch.inf, self.steps)))
        self.steps += 1

    def first(self) -> Quantity | None:
        """The first that was not finite; waits for the device."""
        if bool(self.since.isinf().all()):
            return None
        return self.quantities[int(self.since.argmin())]
