"""The kernel of a norm against its plain form."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from aq_lightning.kernels import rms_norm as kernel
from aq_lightning.kernels.rms_norm import LARGEST, naive, rms_norm, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype, far", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 3, 1000), (2, 4096), (1, LARGEST)])
def test_kernel_equals_the_plain_form(shape: tuple[int, ...], dtype: torch.dtype, far: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(shape, generator=generator).to(DEVICE, dtype)
    weight = 1 + torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)  # freed at once: the answer takes its place
    found = triton.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype and found.shape == x.shape
    assert_close("the plain form", naive.rms_norm(x.double(), weight.double(), 1e-5), found.double(), far)


def test_numbers_whose_squares_float16_does_not_hold() -> None:
    x = torch.tensor([[6e4, -6e4, 0.0, 6e4]], dtype=torch.float16, device=DEVICE)
    ones = torch.ones(4, dtype=torch.float16, device=DEVICE)
    assert_close(
        "great", naive.rms_norm(x.double(), ones.double(), 1e-6), triton.rms_norm(x, ones, 1e-6).double(), 1e-3
    )
    assert not triton.rms_norm(torch.zeros_like(x), ones, 1e-6).any()


def test_what_the_kernel_cannot_do_is_done_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 6, device=DEVICE), torch.randn(6, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    root = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close("gradient", (x / root).sum(0), weight.grad, 1e-5)
    weight = weight.detach()
    compiled = torch.compile(rms_norm, fullgraph=True, backend="eager")
    assert_close("one graph", naive.rms_norm(x, weight, 1e-5), compiled(x, weight, 1e-5), 1e-6)
    assert kernel._served(x, weight) and not kernel._served(x.T.contiguous().T, weight)
    assert not kernel._served(x.view(4, 12), weight) and not kernel._served(x, weight.expand(2, -1)[0, ::2])
    with pytest.raises(RuntimeError):
        rms_norm(x.view(4, 12), weight, 1e-5)
    assert rms_norm(x[:, :6][:0], weight, 1e-5).shape == (0, 6)
    monkeypatch.setattr(kernel, "_one_kernel", lambda *_: True)
    assert_close(
        "the kernel", naive.rms_norm(x.double(), weight.double(), 1e-5), rms_norm(x, weight, 1e-5).double(), 1e-6
    )
