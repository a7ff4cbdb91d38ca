"""Optimizers that know no float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class SinglePrecision(Optimizer):
    """Another optimizer on float32 copies of the parameters that are float64: bitsandbytes' 8-bit and paged ones refuse
    these.

    A copy is made anew from its parameter before each step, so there is no state but that of the other optimizer.

    Args:
        params: parameters or groups.
        optimizer: the other.
    """

    def __init__(self, params: Iterable, optimizer: Callable[[Iterable], Optimizer]) -> None:
        given = list(params)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        self._copies = {
            each: nn.Parameter(each.detach().float())
            for group in groups
            for each in group["params"]
            if each.dtype == torch.float64
        }
        copied = [{**group, "params": [self._copies.get(each, each) for each in group["params"]]} for group in groups]
        self.inner = optimizer(copied)
        super().__init__(groups, self.inner.defaults)
        self.state = _Translated(self._copies, self.inner.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the other optimizer."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for parameter, copy in self._copies.items():
            copy.data = parameter.float()
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        for own, other in zip(self.param_groups, self.inner.param_groups, strict=True):
            other.update({name: value for name, value in own.items() if name != "params"})
        self.inner.step()
        for parameter, copy in self._copies.items():
            parameter.copy_(copy)
            copy.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.state = _Translated(self._copies, self.inner.state)
        for own, other in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({name: value for name, value in other.items() if name != "params"})


class _Translated(MutableMapping):
    """A state by parameters, where it is kept by their copies."""

    def __init__(self, copies: dict[Tensor, Tensor], state: MutableMapping) -> None:
        self._copies, self._state = copies, state

    def __getitem__(self, key: Tensor) -> Any:
        return dict(self._state)[self._copies.get(key, key)]  # where no default appears

    def __setitem__(self, key: Tensor, value: Any) -> None:
        self._state[self._copies.get(key, key)] = value

    def __delitem__(self, key: Tensor) -> None:
        del self._state[self._copies.get(key, key)]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(list(self._state))

    def __len__(self) -> int:
        return len(self._state)
