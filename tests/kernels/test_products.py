"""Products in float32 stay products in float32, whoever computes them."""

from __future__ import annotations

import pytest
import torch

from aq_lightning.kernels.products import fast_products, matmul_precision, onednn_is_exact

SHAPES = [(64, 48, 32), (256, 576, 576), (1024, 1536, 576), (7, 3000, 130)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).detach().abs().max() / exact.detach().abs().max())


@pytest.mark.parametrize("rows, inner, columns", SHAPES)
def test_fast_products_on_a_cpu_keep_float32(rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inner, generator=generator, requires_grad=True)
    weight = torch.randn(columns, inner, generator=generator, requires_grad=True)
    answer = torch.randn(rows, columns, generator=generator)
    with fast_products(torch.device("cpu")):
        found = torch.nn.functional.linear(x, weight)
        gradients = torch.autograd.grad(found, (x, weight), answer)
    assert error(found, x.double() @ weight.double().T) < 1e-5
    assert error(gradients[0], answer.double() @ weight.double()) < 1e-5
    assert error(gradients[1], answer.double().T @ x.double()) < 1e-5
    rounded = x.bfloat16().double() @ weight.bfloat16().double().T
    assert error(rounded, x.double() @ weight.double().T) > 1e-4  # the control: what bfloat16 would do


def test_precision_is_as_it_was_behind_it() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), fast_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == ("medium" if onednn_is_exact() else "highest")
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_products_on_a_gpu_are_left_alone() -> None:
    with matmul_precision("high"), fast_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"


def test_a_processor_that_rounds_is_left_to_the_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not onednn_is_exact.__wrapped__()
