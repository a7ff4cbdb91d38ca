"""Calling a block: every architecture's as (hidden, **arguments) → hidden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

BlockFunction = Callable[..., Tensor]
"""(hidden, **arguments) → hidden, or a tuple that starts with it: a block, or what stands for one."""
Arguments = Mapping[str, object]
"""Keyword arguments of a block that do not depend on the sample: masks, rotary tables, positions."""


@dataclass(frozen=True)
class PerSample:
    """An argument whose first dimension counts samples and does not broadcast."""

    value: Tensor
    """For one sample, (k, …); a batch takes (batch · k, …)."""


def answer(block: BlockFunction, hidden: Tensor, arguments: Arguments) -> Tensor:
    """A block's answer, (batch, length, hidden) → the same."""
    expanded = {
        name: _repeated(value.value, hidden.shape[0]) if isinstance(value, PerSample) else value
        for name, value in arguments.items()
    }
    output = block(hidden, **expanded)
    return output[0] if isinstance(output, tuple) else output


def _repeated(value: Tensor, batch: int) -> Tensor:
    return value.repeat(batch, *[1] * (value.ndim - 1))
