"""How far activations and weights reach, in a few numbers for the journal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from aq_lightning.calibration.attach import weights
from aq_lightning.calibration.observe import Ranges

Reach = Mapping[str, dict[str, float | None]]
"""By name: ``greatest`` magnitude, and ``spread``, that of the greatest channel over that of the median channel (None:
half of the channels are zero)."""


def activation_reach(observed: Sequence[Ranges]) -> Reach:
    """At each site, over all tokens seen, the worst of the window's blocks; none where no token came."""
    reaches: dict[str, dict[str, float | None]] = {}
    for ranges in observed:
        for site, seen in ranges.items():
            for one in (one for one in seen if one.tokens):
                reaches[site] = _worse(reaches.get(site), _reach(one.low.abs().maximum(one.high.abs())))
    return reaches


def weight_reach(blocks: Sequence[nn.Module]) -> Reach:
    """Of each weight that is quantized, its channels being what it reads, and the worst of the window's blocks."""
    reaches: dict[str, dict[str, float | None]] = {}
    for block in blocks:
        for name, weight in weights(block).items():
            columns = weight.detach().abs().flatten(0, -2).amax(0)  # (in)
            reaches[name] = _worse(reaches.get(name), _reach(columns))
    return reaches


def _reach(channels: Tensor) -> dict[str, float | None]:
    """Of the magnitudes of channels, (channels)."""
    greatest, median = float(channels.max()), float(channels.median())
    return {"greatest": greatest, "spread": greatest / median if median > 0 else None}


def _worse(known: dict[str, float | None] | None, new: dict[str, float | None]) -> dict[str, float | None]:
    """The greater of both in each number; what has none is the worst."""
    if known is None:
        return new
    both = {name: max(math.inf if v is None else v for v in (known[name], new[name])) for name in new}
    return {name: value if math.isfinite(value) else None for name, value in both.items()}
