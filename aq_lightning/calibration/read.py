"""What each quantized weight of a block reads: who reads together, and the second moments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from aq_lightning import distributed
from aq_lightning.experts import experts_of, hooked, stacks
from aq_lightning.rounders import Moments

Look = Callable[[str, int, Tensor], None]
"""(weight, number of the expert, what it reads: (tokens, in)); a linear counts as one expert."""


def read_together(block: nn.Module, names: Collection[str], run: Callable[[], object]) -> list[list[str]]:
    """Groups of weights that read the same tensor, in the order of reading.

    Args:
        block: the block.
        names: its quantized weights.
        run: passes something through the block.
    """
    stacked = stacks(block)
    groups: list[tuple[Tensor, list[str]]] = []

    def note(name: str, given: Tensor) -> None:
        if not groups or groups[-1][0] is not given:
            groups.append((given, []))
        groups[-1][1].append(name)

    with ExitStack() as hooks:
        for name in names:
            if name not in stacked:
                reader = block.get_submodule(name.removesuffix(".weight"))
                hook = reader.register_forward_pre_hook(
                    lambda _, inputs, name=name: note(name, inputs[0]),
                    prepend=True,  # before it is quantized
                )
                hooks.callback(hook.remove)
        run()
    inside = [[name] for name in names if name in stacked]  # experts come last: what they read, then what is inside
    return [group for _, group in groups] + inside


@contextmanager
def looking(block: nn.Module, names: Collection[str], look: Look) -> Iterator[None]:
    """While it is open, ``look`` sees what each of the weights reads, as it is after quantization of activations."""
    with ExitStack() as hooks:
        for name in set(names) - set(stacks(block)):
            reader = block.get_submodule(name.removesuffix(".weight"))
            hook = reader.register_forward_pre_hook(
                lambda _, inputs, name=name: look(name, 0, inputs[0].flatten(0, -2))
            )
            hooks.callback(hook.remove)
        for path, experts in ((p, m) for p, m in block.named_modules() if m in experts_of(block)):
            outer, inner = f"{path}.gate_up_proj", f"{path}.down_proj"
            if outer in names:
                hook = experts.register_forward_pre_hook(
                    lambda module, inputs, name=outer: _routed(len(module.gate_up_proj), name, look, *inputs)
                )
                hooks.callback(hook.remove)
            if inner in names:
                hooks.enter_context(hooked(experts, lambda e, x, name=inner: _seen(look, name, e, x)))
        yield


def _routed(experts: int, name: str, look: Look, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
    """Each expert's tokens of (tokens, hidden)."""
    for expert in range(experts):
        look(name, expert, hidden.flatten(0, -2)[(chosen == expert).any(-1)])


def _seen(look: Look, name: str, expert: int, inner: Tensor) -> Tensor:
    look(name, expert, inner)
    return inner


class MomentSums:
    """Second moments of what a weight reads, summed over tokens.

    Args:
        experts: that read, each tokens of its own; 1 for a linear.
        centre: subtracted from what is read, float64 (in).
        asymmetric: whether the full-precision model's reading is compared; of experts it cannot be, for the two models
            route tokens differently.
    """

    def __init__(self, experts: int, centre: Tensor, asymmetric: bool) -> None:
        self.centre = centre.float()
        self.tokens = [0] * experts
        self.second = centre.new_zeros(experts, len(centre), len(centre))  # H before division
        self.asymmetry = torch.zeros_like(self.second[0]) if asymmetric and experts == 1 else None
        self.full: Tensor | None = None

    def look(self, expert: int, x: Tensor) -> None:
        """Takes in (tokens, in)."""
        read = x.float()
        centred = read - self.centre
        self.tokens[expert] += len(x)
        self.second[expert] += (centred.T @ centred).double()
        if self.asymmetry is not None:
            self.asymmetry += ((self.full.float() - read).T @ centred).double()

    def look_full(self, expert: int, x: Tensor) -> None:
        """Remembers what the full-precision model reads of the same tokens."""
        self.full = x

    def moments(self) -> list[Moments]:
        """Of each expert, with what it read in all processes; zeros for one that saw nothing."""
        tokens = self.second.new_tensor(self.tokens)  # (experts)
        distributed.add_up([self.second, tokens, *([] if self.asymmetry is None else [self.asymmetry])])
        self.tokens = [int(each) for each in tokens.tolist()]
        counts = [max(tokens, 1) for tokens in self.tokens]
        asymmetry = None if self.asymmetry is None else self.asymmetry / counts[0]
        return [Moments(second / n, asymmetry) for second, n in zip(self.second, counts, strict=True)]
