"""What online products cost at run time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from aq_lightning.attention import attentions
from aq_lightning.experts import stacks, weights_per_token
from aq_lightning.models.lookup import architecture_of, heads_of
from aq_lightning.transforms.online import Online, carried


@dataclass(frozen=True)
class Overhead:
    """What the online products of some blocks add, and what it is compared to."""

    numbers: int
    """Stored numbers."""
    multiply_adds: int
    """Multiply–adds per token."""
    weights: int
    """Weights of the blocks' linears, those of all experts included."""
    own: int
    """The linears' multiply–adds per token: one for each weight that a token meets."""

    @property
    def percent(self) -> float:
        """Multiply–adds per token, in percent of the linears' own."""
        return 100 * self.multiply_adds / self.own

    def bits(self, width: int) -> float:
        """Bits per weight, of numbers of ``width`` bits."""
        return self.numbers * width / self.weights


def overhead(blocks: nn.Module) -> Overhead:
    """Counts every online product below ``blocks``, which may be on the meta device.

    A dense matrix of n channels has n² numbers and as many multiply–adds; blocks of width b have n · b of both, or
    fewer numbers where query heads share them; a Kronecker product has n₁² + n₂² numbers and n (n₁ + n₂)
    multiply–adds.
    """
    dense = sum(module.weight.numel() for module in blocks.modules() if isinstance(module, nn.Linear))
    weights = dense + sum(stack.numel() for stack in stacks(blocks).values())
    costs = [_cost(module, online) for module, online in carried(blocks)]
    numbers, counts = sum(numbers for numbers, _ in costs), sum(count for _, count in costs)
    return Overhead(numbers, counts, weights, dense + weights_per_token(blocks))


def overhead_lines(block: nn.Module, carriers: dict[str, str], blocks: int, width: int) -> list[str]:
    """The cost of a recipe, one line for each site and one for all; nothing if nothing is online.

    Args:
        block: one of the model's blocks, on the meta device, with the recipe attached.
        carriers: site → the module that carries its products.
        blocks: their number.
        width: bits of a stored number.
    """
    own = overhead(block)
    lines = []
    for site, path in carriers.items():
        module = block.get_submodule(path)
        one = Overhead(*_cost(module, module.online), own.weights, own.own)
        lines.append(f"online: {site} ({path}): {_amount(one, width)} in each of {blocks} blocks")
    if lines:
        total = Overhead(own.numbers * blocks, own.multiply_adds * blocks, own.weights * blocks, own.own * blocks)
        lines.append(f"online in all, against the blocks' linears: {_amount(total, width)}")
    return lines


def _cost(module: nn.Module, online: Online) -> tuple[int, int]:
    """Numbers and multiply–adds per token of what a module carries."""
    numbers = sum(tensor.numel() for tensor in online.parameters())
    return numbers, sum(operation.multiply_adds(_channels(module)) for operation in online)


def _channels(module: nn.Module) -> int:
    """How many channels of a token a module's products meet."""
    if module in attentions(module):
        heads = heads_of(module.config, architecture_of(module.config))
        return (heads.query + heads.key_value) * heads.size
    return module.weight.shape[-1]  # of a norm's gain (channels) or a linear's weight (out, in)


def _amount(cost: Overhead, width: int) -> str:
    return (
        f"{cost.multiply_adds:,} multiply–adds per token (+{cost.percent:.2f} %) and {cost.bits(width):.3f} bits per "
        f"weight ({cost.numbers:,} numbers)"
    )
