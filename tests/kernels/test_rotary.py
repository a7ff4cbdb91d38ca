"""The kernel of rotary position embedding against its plain form."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from aq_lightning.kernels import rotary as kernel
from aq_lightning.kernels.rotary import naive, rotary, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1, 1, 2), (2, 4, 2, 5, 8), (1, 3, 1, 7, 6), (3, 2, 2, 1, 80), (1, 40, 8, 2, 128), (2, 1, 3, 3, 256)]
"""Batch, heads, key heads, tokens, size: sizes and heads that fill no block, and more heads than a block has."""


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries and keys as a joint product of q, k and v leaves them: views of parts of its rows."""
    batch, first, second, tokens, size = shape
    widths = [first * size, second * size, second * size]
    both = torch.randn(batch, tokens, sum(widths), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    q, k, _ = (part.view(batch, tokens, -1, size).transpose(1, 2) for part in both.split(widths, -1))
    return q, k


def angles(batch: int, tokens: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines, of which the second half of a head has its own."""
    phases = 9 * torch.randn(batch, tokens, size, generator=torch.Generator().manual_seed(1))
    return phases.cos().to(DEVICE, dtype), phases.sin().to(DEVICE, dtype)


def compare(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, far: float = 1e-6) -> None:
    """The kernel with the plain form in float64, whose memory order it keeps."""
    kept = q.clone()
    torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)  # freed at once: the answers take its place
    torch.full(k.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    found = triton.rotary(q, k, cos, sin)
    expected = naive.rotary(q.double(), k.double(), cos.double(), sin.double())
    for name, one, other in zip(("queries", "keys"), expected, found, strict=True):
        assert_close(name, one, other.double(), far)
        order = sorted(dim for dim in range(4) if one.shape[dim] > 1)
        assert other.dtype == q.dtype and [other.stride(d) for d in order] == [one.stride(d) for d in order]
    assert torch.equal(q, kept)


@pytest.mark.parametrize("dtype, far", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_the_plain_form(shape: tuple[int, ...], dtype: torch.dtype, far: float) -> None:
    batch, *_, tokens, size = shape
    q, k = heads(*shape, dtype=dtype)
    for count in {1, batch}:
        compare(q, k, *angles(count, tokens, size, dtype), far)


def test_it_turns_pairs_half_a_head_apart() -> None:
    q, k = (torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], device=DEVICE) * scale for scale in (1, 10))
    cos = torch.tensor([[[2.0, 3.0, 5.0, 7.0]]], device=DEVICE)
    sin = torch.tensor([[[11.0, 13.0, 17.0, 19.0]]], device=DEVICE)
    for turn in (naive.rotary, triton.rotary):
        found = turn(q, k, cos, sin)
        assert found[0].flatten().tolist() == [2 - 33, 6 - 52, 15 + 17, 28 + 38]
        assert found[1].flatten().tolist() == [-310, -460, 320, 660]


def test_it_is_rounded_once() -> None:
    """In float16: the interpreter cuts bfloat16 off."""
    q, k = heads(2, 3, 2, 5, 24, dtype=torch.float16)
    cos, sin = angles(2, 5, 24, torch.float16)
    exact = naive.rotary(q.float(), k.float(), cos.float(), sin.float())
    for one, other in zip(exact, triton.rotary(q, k, cos, sin), strict=True):
        assert (one.half() == other).float().mean() > 0.99, "but for what a fused addition rounds otherwise"


def test_heads_in_any_order_of_memory() -> None:
    cos, sin = angles(2, 5, 8)
    q, k = heads(2, 4, 2, 5, 8)
    compare(q.contiguous(), k.contiguous(), cos, sin)
    compare(q.contiguous(), k, cos, sin)
    compare(q[:, ::2], k[:, :1], cos, sin)
    compare(q[..., :6], k[..., 2:], cos[..., :6], sin[..., 2:])
    compare(q, k[:, :1].expand(2, 3, 5, 8), cos[:1].expand(2, 5, 8), sin)
    compare(q[:, :, 1:4], k[:, :, 2:], cos[:, 1:4], sin[:, 2:])


def test_what_the_kernel_does_not_read_is_computed_plainly() -> None:
    q, k = heads(2, 4, 2, 5, 8)
    cos, sin = angles(2, 5, 8)
    assert kernel._served(q, k, cos, sin) and kernel._served(q, k, cos[:1], sin[:1])
    wide = torch.randn(2, 5, 16, device=DEVICE)[..., ::2]
    for other in (
        (q, k, cos.double(), sin.double()),
        (q.double(), k, cos, sin),
        (q, k, cos[:, :1], sin[:, :1]),
        (q, k, wide, sin),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k, cos, sin),
        (q[..., :7], k[..., :7], cos[..., :7], sin[..., :7]),
        (q[:0], k[:0], cos[:0], sin[:0]),
        (q[:1], k, cos, sin),
        (q, k, cos[:1], sin),
        (q[0], k[0], cos, sin),
    ):
        assert not kernel._served(*other)
        for one, found in zip(naive.rotary(*other), rotary(*other), strict=True):
            assert torch.equal(one, found)


def test_a_call_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = heads(2, 4, 2, 5, 8)
    cos, sin = angles(1, 5, 8)
    monkeypatch.setattr(kernel, "_one_kernel", kernel._served)
    for one, found in zip(naive.rotary(q, k, cos, sin), rotary(q, k, cos, sin), strict=True):
        assert_close("by the kernel", one, found, 1e-6)


def test_gradients_and_compilers_get_the_plain_form() -> None:
    q, k = heads(2, 4, 2, 5, 8)
    cos, sin = angles(1, 5, 8)
    q = q.clone().requires_grad_()
    rotary(q, k, cos, sin)[0].sum().backward()
    back = torch.ones_like(q) * cos[:, None] - naive.rotate_half(sin[:, None].expand_as(q))
    assert_close("gradient", back, q.grad, 1e-6)
    compiled = torch.compile(rotary, fullgraph=True, backend="eager")
    assert_close("one graph", naive.rotary(q, k, cos, sin)[1], compiled(q, k, cos, sin)[1], 1e-6)


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.device_count() < 2, reason="another device than the current one")
def test_on_a_device_that_is_not_the_current_one() -> None:
    here = *heads(2, 4, 2, 5, 8), *angles(1, 5, 8)
    there = rotary(*(tensor.cuda(1) for tensor in here))
    for one, found in zip(rotary(*here), there, strict=True):
        assert found.device.index == 1 and torch.equal(one, found.to(one.device))
