"""The experts of a block, run so that each one's activations can be seen and changed.

transformers keeps the experts of a block in two parameters of one module, ``gate_up_proj`` (experts, 2 · width, hidden)
and ``down_proj`` (experts, hidden, width), and lets the configuration name the function that runs them. Ours takes
every floating-point type, obeys autocast, adds up in a fixed order and has hooks where an expert's last linear reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from aq_lightning.errors import RequestError

Hook = Callable[[int, Tensor], Tensor]
"""(expert, activation (tokens, width)) → what the expert's last linear reads instead."""

_NAME = "aq_lightning"
_HOOKS: WeakKeyDictionary[nn.Module, list[Hook]] = WeakKeyDictionary()


def stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Linears of all experts by name: parameters (experts, out, in)."""
    return {
        name: parameter
        for path, part in module.named_modules()
        if _holds_experts(part)
        for name, parameter in part.named_parameters(prefix=path, recurse=False)
    }


def experts_of(module: nn.Module) -> list[nn.Module]:
    """The modules that hold experts."""
    return [part for part in module.modules() if _holds_experts(part)]


def _holds_experts(module: nn.Module) -> bool:
    """Whether transformers runs it by the implementation that is named: then it notes there how the weights lie."""
    return "has_gate" in vars(module)


def weights_per_token(module: nn.Module) -> int:
    """Weights of experts that one token meets."""
    return sum(
        parameter[0].numel() * experts.config.num_experts_per_tok
        for experts in experts_of(module)
        for parameter in stacks(experts).values()
    )


def run_here(config: PreTrainedConfig) -> None:
    """Makes every model that reads this configuration run its experts by :func:`forward`; it is not saved."""
    config._experts_implementation = _NAME


@contextmanager
def hooked(experts: nn.Module, hook: Hook) -> Iterator[None]:
    """While it is open, ``hook`` sees what enters the last linear of every expert that has tokens."""
    before = experts.config._experts_implementation
    run_here(experts.config)
    hooks = _HOOKS.setdefault(experts, [])
    hooks.append(hook)
    try:
        yield
    finally:
        hooks.remove(hook)
        experts.config._experts_implementation = before


@torch.compiler.disable  # how many tokens an expert has decides every shape
def forward(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each token's experts, weighted and added up.

    Args:
        experts: the module with the parameters.
        hidden: (tokens, hidden).
        chosen: experts of each token, int64 (tokens, k).
        weights: of the experts' answers, (tokens, k).

    Returns:
        (tokens, hidden).

    Raises:
        RequestError: experts with biases, transposed weights or no gate.
    """
    if experts.has_bias or experts.is_transposed or not experts.has_gate:
        raise RequestError(
            f"Experts have gated linears (out, in) without biases, got {type(experts).__name__}: their architecture "
            "needs a function of its own in aq_lightning/experts.py."
        )
    order = chosen.flatten().argsort(stable=True)  # (tokens · k), expert after expert
    counts = chosen.flatten().bincount(minlength=experts.gate_up_proj.shape[0]).tolist()
    answers = []
    for expert, x in enumerate(hidden[order // chosen.shape[1]].split(counts)):  # (tokens of the expert, hidden)
        if len(x):
            inner = experts._apply_gate(linear(x, experts.gate_up_proj[expert]))  # (tokens of the expert, width)
            for hook in _HOOKS.get(experts, ()):
                inner = hook(expert, inner)
            answers.append(linear(inner, experts.down_proj[expert]))
    back = torch.cat(answers)[order.argsort()].unflatten(0, chosen.shape)  # (tokens, k, hidden)
    return (back * weights[..., None]).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(_NAME, forward)
