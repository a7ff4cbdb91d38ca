"""What a product costs the host: an operator each, one plan for all calls that look alike, launches without a search.

A product of few tokens takes a GPU some microseconds, less than Python that checks, looks up and launches. So what
depends on shapes alone is done once for each, and the rest is as short as it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from aq_lightning.errors import RequestError

_LIBRARY = torch.library.Library("aq_lightning", "FRAGMENT")
_PLANS = 1024  # of an operator: shapes of a long-lived process have no bound
_ALIGNMENT = 16  # bytes: Triton compiles other code for tensors that do not begin at a multiple

Compute = Callable[..., Tensor]


class _Final(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RequestError("Products with packed weights have no gradient, got a backward pass: use torch.no_grad().")


def operator(compute: Compute) -> Compute:
    """Makes a function of (x, words, scales, …) whose answer is (…, N) an operator of its name, which torch.compile and
    CUDA graphs keep as one.

    It is what ``torch.library.custom_op`` makes, without its three functions in Python around each call. It has no
    gradient: a backward pass through it is an error, not zeros.
    """
    name = compute.__name__.lstrip("_")
    _LIBRARY.define(name + torch.library.infer_schema(compute, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", _like, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, _LIBRARY.ns), name).default

    @wraps(compute)
    def call(*operands: Any, **named: Any) -> Tensor:
        y = overload(*operands, **named)
        return _Final.apply(y) if y.requires_grad else y

    return call


def _like(x: Tensor, words: Tensor, scales: Tensor, *more: Any) -> Tensor:
    """An answer without numbers."""
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def planned(make: Callable[..., Compute]) -> Callable[..., Compute]:
    """Keeps what ``make`` returns for operands (x, words, scales, bits, bias, …), to be called with others that look
    like them.

    ``make`` reads shapes, dtypes, devices and whether tensors are contiguous, never the numbers in them, and refuses
    what does not fit together: so nothing that agrees with accepted operands in these has to be checked again.
    """
    plans: dict[tuple, Compute] = {}

    def find(x: Tensor, words: Tensor, scales: Tensor, bits: int, bias: Tensor | None, *more: Any) -> Compute:
        key = (
            x.shape, x.dtype, x.device, words.shape, words.dtype, words.device, words.is_contiguous(),
            scales.shape, scales.dtype, scales.device, scales.is_contiguous(), bits, _look(bias), *map(_look, more),
        )  # fmt: skip
        plan = plans.get(key)
        if plan is None:
            plan = make(x, words, scales, bits, bias, *more)
            if len(plans) >= _PLANS:
                plans.clear()
            plans[key] = plan
        return plan

    return find


def _look(operand: Any) -> Any:
    """What a plan may know of an operand."""
    if not isinstance(operand, Tensor):
        return operand
    return operand.shape, operand.dtype, operand.device, operand.is_contiguous()


class Launch:
    """A Triton kernel with all but its tensors decided.

    Triton searches for a kernel's binary with all arguments at every launch. Here that of the first is kept and called
    as Triton offers it, with tensors of the same dtypes, on the same device. Those that are not aligned as binaries
    expect them are launched as Triton would.

    Args:
        kernel: its parameters are tensors, then ``numbers``, then ``constants``.
        grid: blocks.
        numbers: in the order of the parameters.
        constants: of compilation, by name.
        options: of the compiler.
    """

    def __init__(
        self, kernel: Any, grid: Sequence[int], numbers: Sequence[int], constants: Mapping[str, Any], **options: Any
    ) -> None:
        self._kernel, self._grid, self._options = kernel, (*grid, 1, 1)[:3], options
        self._behind = (*numbers, *(constants[name] for name in kernel.arg_names[-len(constants) :]))
        self._run: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*tensors)
        addresses = 0
        for tensor in tensors:
            if tensor is not None:
                addresses |= tensor.data_ptr()
        if addresses % _ALIGNMENT:
            self._search(tensors)
        elif self._run is None:
            binary = self._search(tensors)
            self._run = None if binary is None else binary[self._grid]  # None: Triton's interpreter
        else:
            self._run(*tensors, *self._behind)

    def _search(self, tensors: Sequence[Tensor | None]) -> Any:
        return self._kernel[self._grid](*tensors, *self._behind, **self._options)
