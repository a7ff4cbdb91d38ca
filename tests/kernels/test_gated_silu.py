"""The kernel of a gate against its plain form."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from aq_lightning.kernels import gated_silu as kernel
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


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter
def test_large_gates_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, float("nan")]], device=DEVICE)
    found = triton.gated_silu(gate, torch.full_like(gate, 2.0))
    assert found[0, :5].tolist() == [0.0, found[0, 1].item(), 0.0, 200.0, 2e4] and found[0, 5].isnan()
    assert -1e-40 < found[0, 1] <= 0


def test_any_leading_dimensions_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = halves(2, 3, 40, dtype=torch.float32)
    assert gated_silu(gate[:0], up[:0]).shape == (0, 3, 40)
    monkeypatch.setattr(kernel, "_one_kernel", lambda *_: True)
    assert_close("three dimensions", naive.gated_silu(gate.double(), up.double()), gated_silu(gate, up).double(), 1e-6)


def test_what_the_kernel_cannot_do_is_done_plainly() -> None:
    gate, up = halves(3, 3, dtype=torch.float32)
    assert_close("columns apart", naive.gated_silu(gate.T, up.T), gated_silu(gate.T, up.T), 1e-6)
    gate = gate.clone().requires_grad_()
    gated_silu(gate, up).sum().backward()
    slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid())) * up
    assert_close("gradient", slope.detach(), gate.grad, 1e-5)
    compiled = torch.compile(gated_silu, fullgraph=True, backend="eager")
    assert_close("one graph", naive.gated_silu(gate, up).detach(), compiled(gate, up).detach(), 1e-6)
