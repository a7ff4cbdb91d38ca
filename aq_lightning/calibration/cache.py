"""Where static scales of keys and values start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aq_lightning import distributed
from aq_lightning.attention import Heads
from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.rounding import FoldedBlock, Passes
from aq_lightning.qtensor import decode, encode, grid_of
from aq_lightning.transforms import StaticCache

_LEAST = 0.3  # part of the range that is tried
_TRIED = 15


@torch.no_grad()
def choose_cache(attached: AttachedBlock, passes: Passes, stream: Tensor) -> None:
    """Lets static scales start where the square error of keys and values is least, as attention meets them behind the
    block's other transforms; in two passes, of which the first sees their range.

    Args:
        attached: the block.
        passes: how streams pass through it.
        stream: what enters it, (samples, length, hidden).
    """
    for site, transform in attached.transforms.items():
        factor = transform.factors[-1]
        if not isinstance(factor, StaticCache):
            continue
        operation = attached.block.get_submodule(attached.carriers[site]).online[-1]

        function, seen = FoldedBlock(attached, passes).function({}), _Seen(factor)
        with _watched(operation, seen.extend, factor.reach.shape[-1]):
            passes.run(function, stream)
        seen.share()
        with _watched(operation, seen.compare, factor.reach.shape[-1]):
            passes.run(function, stream)
        distributed.add_up([seen.errors])
        factor.start(seen.reach, seen.parts[seen.errors.argmin(0)])


class _Seen:
    """What is known of keys and values, and the error of every part of their range."""

    def __init__(self, factor: StaticCache) -> None:
        self.grid, self.storage = factor.grid, factor.storage
        self.reach = torch.zeros_like(factor.reach)  # which holds 0: (2, 2, heads, runs)
        self.parts = torch.linspace(1, _LEAST, _TRIED, dtype=torch.float64, device=self.reach.device)
        self.errors = self.reach.new_zeros(_TRIED, *self.reach[:, 0].shape)  # (parts, 2, heads, runs)

    def extend(self, x: Tensor) -> None:
        """Takes in (2, heads, runs, numbers)."""
        self.reach = torch.stack([torch.minimum(self.reach[:, 0], x.amin(-1).double()),
                                  torch.maximum(self.reach[:, 1], x.amax(-1).double())], 1)  # fmt: skip

    def share(self) -> None:
        """Takes in what all other processes have seen."""
        self.reach = torch.stack([distributed.least(self.reach[:, 0]), distributed.greatest(self.reach[:, 1])], 1)

    def compare(self, x: Tensor) -> None:
        """Adds up what rounding does to (2, heads, runs, numbers)."""
        for part, errors in zip(self.parts, self.errors, strict=True):
            low, high = (self.reach * part).to(x.dtype)[..., None].unbind(1)  # (2, heads, runs, 1) each
            grid = grid_of(low, high, self.grid, self.storage)
            errors += (x - decode(encode(x, *grid, self.grid), *grid)).double().square().sum(-1)


def _watched(operation: nn.Module, look: Callable[[Tensor], None], runs: int) -> RemovableHandle:
    """While it is open, shows keys and values of every batch."""
    return operation.register_forward_pre_hook(lambda _, inputs: look(_joined(inputs[0], runs)))


def _joined(heads: Heads, runs: int) -> Tensor:
    """Keys and values (batch, heads, tokens, size) → (2, heads, runs, numbers) in float32 at least."""
    both = torch.stack([heads.key, heads.value])
    both = both.to(torch.promote_types(both.dtype, torch.float32)).unflatten(-1, (runs, -1))
    return both.permute(0, 2, 4, 1, 3, 5).flatten(3)
