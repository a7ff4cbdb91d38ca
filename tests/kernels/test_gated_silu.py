"""The kernel of a gate against its plain form."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from aq_lightning.kernels.gated_silu import gated_silu, naive, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def halves(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gate and up as a joint product leaves them: two halves of each row."""
    both = 4 * torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0))
    gate, up = both.to(DEVICE, dtype).split(shape[-1], -1)
    return gate, up


@pytest.mark.parametrize("dtype, far", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 1024), (2, 1025)])
def test_kernel_equals_the_plain_form(shape: tuple[int, ...], dtype: torch.dtype, far: float) -> None:
    gate, up = halves(*shape, dtype=dtype)
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)  # freed at once: the answer takes its place
    found = triton.gated_silu(gate, up)
    assert found.is_contiguous() and found.dtype == dtype
    assert_close("the plain form", naive.gated_silu(gate.double(), up.double()), found.double(), far)


def test_large_gates_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, float("nan")]], device=DEVICE)
    found = triton.gated_silu(gate, torch.full_like(gate, 2.0))
    assert found[0, :5].tolist() == [0.0, found[0, 1].item(), 0.0, 200.0, 2e4] and found[0, 5].isnan()
    assert -1e-40 < found[0, 1] <= 0


def test_any_leading_dimensions_and_none() -> None:
    gate, up = halves(2, 3, 40, dtype=torch.float32)
    assert_close("three dimensions", naive.gated_silu(gate, up), gated_silu(gate, up), 1e-6)
    assert gated_silu(gate[:0], up[:0]).shape == (0, 3, 40)


def test_the_compiler_is_left_to_itself() -> None:
    gate, up = halves(2, 40, dtype=torch.float32)
    compiled = torch.compile(gated_silu, fullgraph=True, backend="eager")
    assert_close("compiled", naive.gated_silu(gate, up), compiled(gate, up), 1e-6)
