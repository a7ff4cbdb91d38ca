"""The answer of an attached block, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.call import Arguments


def answer_plainly(block: AttachedBlock, hidden: Tensor, others: Arguments) -> Tensor:
    """(batch, length, hidden) → the same."""
    return block(hidden, **others)


@cache
def compiled_answer() -> Callable[[AttachedBlock, Tensor, Arguments], Tensor]:
    """One compiled function for the process: blocks of one shape, and with hooks of one kind, share its code.

    Every shape gets its own: code that serves several would depend on which came first, and its sums with it.
    """
    compiled = torch.compile(answer_plainly, dynamic=False)

    def answer(block: AttachedBlock, hidden: Tensor, others: Arguments) -> Tensor:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # hooks quantize activations
            return compiled(block, hidden, others)

    return answer
