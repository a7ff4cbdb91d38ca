"""What is done once for all calls that look alike is right for each of them, and never for those that do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close
from quantized import DEVICE, operands, random_weight
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from aq_lightning.errors import RequestError
from aq_lightning.kernels.dispatch import _PLANS, Launch, planned
from aq_lightning.kernels.int4_int8_matmul import int4_int8_matmul
from aq_lightning.kernels.int4_matmul import int4_matmul
from aq_lightning.kernels.kronecker_matmul import Kronecker, kronecker_matmul
from aq_lightning.kernels.packed import Operands


def packed(rows: int = 20) -> Operands:
    return Operands(*(t.cpu() for t in operands(random_weight(rows, 64, 4, 32, False))[:2]), 4)


BY = Kronecker(torch.eye(4), torch.eye(16), None)
OPERATORS: dict[str, Callable[[Tensor, Operands], Tensor]] = {
    "int4_matmul": lambda x, weight: int4_matmul(x, *weight),
    "int4_int8_matmul": lambda x, weight: int4_int8_matmul(x, *weight, 8),
    "kronecker_matmul": lambda x, weight: kronecker_matmul(x, BY, weight, 8),
}


@pytest.fixture(params=OPERATORS)
def multiply(request: pytest.FixtureRequest) -> Callable[[Tensor, Operands], Tensor]:
    return OPERATORS[request.param]


def test_what_was_accepted_once_does_not_open_the_door(multiply) -> None:
    weight, x = packed(), torch.randn(2, 64)
    expected = multiply(x, weight)
    for wrong in (
        (x.double(), weight),
        (x[:, :32], weight),
        (x, weight._replace(bits=3)),
        (x, weight._replace(words=weight.words.int())),
        (x, weight._replace(words=weight.words.transpose(3, 4).contiguous().transpose(3, 4))),
        (x, weight._replace(scales=weight.scales.float())),
        (x, weight._replace(scales=weight.scales[:, :19])),
    ):
        for _ in range(2):  # nor does it open by knocking twice
            with pytest.raises(RequestError):
                multiply(*wrong)
    assert torch.equal(multiply(x, weight), expected)


def test_a_plan_knows_no_numbers(multiply) -> None:
    first, second = packed(), packed()
    x = torch.randn(2, 64)
    y = multiply(x, first)
    second.words.copy_(~first.words)
    other = multiply(x, second)
    assert not torch.equal(y, other) and torch.equal(multiply(x, first), y)
    assert torch.equal(multiply(-x[None], second)[0], multiply(-x, second))


def test_strides_of_activations_do_not_matter(multiply) -> None:
    weight, x = packed(), torch.randn(3, 2, 64)
    apart = x.transpose(0, 1)
    assert_close("y", multiply(apart.contiguous(), weight), multiply(apart, weight), 1e-6)
    assert multiply(x[:0], weight).shape == (0, 2, 20)


def test_it_has_no_gradient(multiply) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    y = multiply(x, packed())
    assert y.requires_grad
    with pytest.raises(RequestError, match="have no gradient, got a backward pass"):
        y.sum().backward()
    with torch.no_grad():
        assert not multiply(x, packed()).requires_grad


def test_torch_traces_one_node(multiply) -> None:
    weight, x = packed(), torch.randn(2, 64)
    with torch.no_grad():
        graph = make_fx(multiply)(x, weight)
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert len([name for name in names if name.startswith("aq_lightning")]) == 1
        compiled = torch.compile(multiply, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), multiply(x, weight))


def test_plans_are_bounded() -> None:
    made: list[int] = []

    @planned
    def make(x, words, scales, bits, bias, *more):
        made.append(bits)
        return lambda *tensors: bits

    tensor = torch.zeros(1)
    for bits in [*range(_PLANS), 0, _PLANS, 0]:
        assert make(tensor, tensor, tensor, bits, None)() == bits
    assert made == [*range(_PLANS), _PLANS, 0]


class Kernel:
    """Triton's, as far as launches see it; keeps what was launched, and whether with a search."""

    arg_names = ("x", "y", "number", "FIRST", "SECOND")

    def __init__(self, interpreted: bool = False) -> None:
        self.launched: list[tuple[bool, tuple, tuple]] = []
        self._interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def launch(*arguments: object, num_warps: int) -> object:
            assert num_warps == 8
            self.launched.append((True, grid, arguments))
            return None if self._interpreted else Binary(self)

        return launch


class Binary:
    """What a launch returns."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self._kernel.launched.append((False, grid, arguments))


def launch_of(kernel: Kernel) -> Launch:
    return Launch(kernel, (5, 2), (7,), {"SECOND": "b", "FIRST": "a"}, num_warps=8)


def test_the_first_launch_searches_for_those_that_are_aligned_alike() -> None:
    kernel, memory = Kernel(), torch.zeros(64)
    launch, odd = launch_of(kernel), memory[1:]
    for x, y in ((odd, None), (memory, None), (memory, None), (odd, None), (memory[4:], None)):
        launch(x, y)
    assert [searched for searched, *_ in kernel.launched] == [True, True, False, True, False]
    for (_, grid, arguments), x in zip(kernel.launched, (odd, memory, memory, odd, memory[4:]), strict=True):
        assert grid == (5, 2, 1) and arguments[1:] == (None, 7, "a", "b")
        assert arguments[0].data_ptr() == x.data_ptr()


def test_an_interpreter_has_no_binary() -> None:
    kernel = Kernel(interpreted=True)
    launch = launch_of(kernel)
    for _ in range(3):
        launch(torch.zeros(4), None)
    assert [searched for searched, *_ in kernel.launched] == [True] * 3


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_on_any_address(bits: int) -> None:
    """Between launches with others, which do not change what these answer."""
    from aq_lightning.kernels.int4_int8_matmul import triton as integer
    from aq_lightning.kernels.int4_matmul import triton
    from aq_lightning.kernels.int4_matmul.config import Config

    weight = operands(random_weight(70, 256, bits, 64, False))
    memory = torch.randn(3 * 256 + 1, device=DEVICE).half()
    odd = memory[1:].view(3, 256)
    even, config = odd.clone(), Config(32, 8, splits=2)
    plans = [triton.plan(even, weight, None, config)]
    plans += [integer.plan(even, weight, 8, None, config)] if bits == 4 else []
    for plan in plans:
        expected = plan(even, weight.words, weight.scales, None)
        for x in (odd, even, odd, even):
            assert torch.equal(plan(x, weight.words, weight.scales, None), expected)


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.device_count() < 2, reason="another device than the current one")
def test_on_a_device_that_is_not_the_current_one() -> None:
    weight, x = packed(70), torch.randn(3, 64).half()
    there = [tensor.cuda(1) for tensor in (x, weight.words, weight.scales)]
    for _ in range(3):
        y = int4_matmul(*there, 4)
        assert y.device == there[0].device and torch.cuda.current_device() == 0
        assert torch.equal(y, int4_matmul(*(tensor.cuda(0) for tensor in there), 4).to(y.device))
