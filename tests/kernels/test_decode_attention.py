"""The kernel for attention of one token against its plain form."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from aq_lightning.kernels.decode_attention import LARGEST, decode_attention, fits, naive, suits, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float16: 1e-3}
if DEVICE == "cuda":  # the interpreter multiplies bfloat16 as integers
    DTYPES[torch.bfloat16] = 8e-3


def operands(
    batch: int, heads: int, group: int, length: int, size: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """A query as a projection leaves it, and caches with room behind every token; poisoned there."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 1, heads * group, size, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    caches = torch.full((2, batch, heads, length, size + 3), torch.nan, device=DEVICE, dtype=dtype)
    caches[..., :size] = torch.randn(2, batch, heads, length, size, generator=generator).to(DEVICE, dtype)
    return query, *caches[..., :size]


@pytest.mark.parametrize("dtype, far", DTYPES.items())
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 16),
        (1, 2, 1, 63, 64),
        (2, 1, 4, 64, 128),
        (1, 3, 3, 65, 80),
        (3, 2, 8, 200, 24),
        (1, 1, 20, 130, 16),
    ],
)
@pytest.mark.parametrize("hidden", ["nothing", "hides", "adds"])
def test_kernel_equals_the_plain_form(shape: tuple[int, ...], dtype: torch.dtype, far: float, hidden: str) -> None:
    query, key, value = operands(*shape, dtype=dtype)
    mask = None
    if hidden != "nothing":
        mask = torch.rand(shape[0], 1, 1, shape[3], generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.7
        mask[..., -1] = True
        for cache in (key, value):
            cache.masked_fill_(~mask.mT, 100.0 if hidden == "adds" else torch.nan)  # nobody reads what is hidden
    expected = naive.decode_attention(query, *(x.nan_to_num(0.0) for x in (key, value)), mask, 0.3)
    if hidden == "adds":
        mask = torch.zeros(mask.shape, dtype=dtype, device=DEVICE).masked_fill_(~mask, torch.finfo(dtype).min)
    torch.full(expected.shape, torch.nan, dtype=dtype, device=DEVICE)  # freed at once: the answer takes its place
    found = triton.decode_attention(query, key, value, mask, 0.3)
    assert found.shape == (shape[0], 1, shape[1] * shape[2], shape[4])
    assert_close("the plain form", expected.double(), found.double(), far)


def test_a_mask_for_all_sequences_and_spans_that_see_nothing() -> None:
    query, key, value = operands(2, 1, 2, 300, 32)
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool, device=DEVICE)
    mask[..., 70:75] = True
    found = triton.decode_attention(query, key, value, mask, 1.0)
    assert_close(
        "five tokens", naive.decode_attention(query, key[:, :, 70:75], value[:, :, 70:75], None, 1.0), found, 1e-3
    )
    assert not triton.decode_attention(query, key, value, torch.zeros_like(mask), 1.0).any(), "nothing is no NaN"
    ones = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE).expand(
        2, 1, 1, 300
    )  # a view that repeats one number
    assert_close(
        "all",
        naive.decode_attention(query, key, value, None, 1.0),
        triton.decode_attention(query, key, value, ones, 1.0),
        1e-3,
    )


def test_the_same_bits_at_every_call_and_far_scores() -> None:
    query, key, value = operands(1, 1, 1, 257, 64)
    found = [triton.decode_attention(100 * query, key, value, None, 5.0) for _ in range(2)]
    assert torch.equal(*found)
    assert_close("the greatest score alone", naive.decode_attention(100 * query, key, value, None, 5.0), found[0], 1e-3)


def test_operator_on_any_device_and_in_one_graph() -> None:
    query, key, value = operands(2, 2, 2, 9, 16)
    key, value = key.contiguous(), value.contiguous()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=DEVICE)
    expected = naive.decode_attention(query, key, value, mask, 0.25)
    reference = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), mask, scale=0.25, enable_gqa=True
    )
    assert_close("PyTorch's", reference.transpose(1, 2), expected.float(), 1e-3)
    compiled = torch.compile(lambda *x: 2 * decode_attention(*x, 0.25), fullgraph=True, backend="aot_eager")
    assert_close("compiled", 2 * expected.float(), compiled(query, key, value, mask).float(), 1e-3)
    torch.library.opcheck(torch.ops.aq_lightning.decode_attention.default, (query, key, value, mask, 0.25))


def test_what_the_kernel_takes() -> None:
    query, key, value = operands(2, 2, 2, 9, 16)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=DEVICE)
    for taken in (None, mask, mask[:1], mask.half()):
        assert fits(query, key, value, taken) and suits(query, key, value, taken) == (DEVICE == "cuda")
    for other in (mask.float(), mask[..., :8], mask.expand(-1, 2, -1, -1)):
        assert not fits(query, key, value, other)
    wide = operands(1, 1, 1, 3, LARGEST + 1)
    assert not fits(*wide, None) and not fits(query.expand(-1, -1, 2, -1), key, value, None)
    assert not fits(query.float(), key, value, None) and not fits(query, key[..., :8], value, None)
    assert not fits(query[:1], key, value, None) and not fits(query, key[:1], value[:1], None), "one for several"
    assert not fits(query[:, :3], key, value, None) and not fits(query, key[:, :, :0], value[:, :, :0], None)
    assert not fits(query, key.mT.contiguous().mT, value, None), "channels apart"
    assert not suits(query.requires_grad_(), key, value, None)
