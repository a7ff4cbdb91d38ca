"""Keys and values on their grid: where attention multiplies them, and as a cache would hold them."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, relative_error
from tiny import MODELS, tiny, tiny_config
from torch import Tensor

from aq_lightning.attention import Heads, attentions, hook_attention
from aq_lightning.calibration import attach
from aq_lightning.errors import RequestError
from aq_lightning.models.lookup import architecture_of
from aq_lightning.qtensor import decode, encode, grid_of
from aq_lightning.quantizers import quantize_cache, quantized
from aq_lightning.scheme import Grid, Scheme

SEEN = [name for name in MODELS if architecture_of(tiny_config(name)).attention]
IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % 90 + 3


def by_hand(x: Tensor, bits: int, run: int) -> Tensor:
    """Run by run of every token and head."""
    result = torch.empty_like(x)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
        for start in range(0, x.shape[-1], run):
            piece = x[(*index, slice(start, start + run))]
            scale, zero = grid_of(piece.min(), piece.max(), Grid(bits))
            result[(*index, slice(start, start + run))] = decode(encode(piece, scale, zero, Grid(bits)), scale, zero)
    return result


@pytest.mark.parametrize("bits, run", [(2, None), (4, None), (4, 8), (8, 4)])
def test_one_grid_for_each_token_and_run(bits: int, run: int | None) -> None:
    heads = Heads(torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16))
    found = quantize_cache(heads, Grid(bits, run))
    assert torch.equal(found.query, heads.query)
    assert torch.equal(found.key, by_hand(heads.key, bits, run or 16))
    assert torch.equal(found.value, by_hand(heads.value, bits, run or 16))
    assert not torch.equal(found.key, heads.key)


@torch.no_grad()
@pytest.mark.parametrize("name", SEEN)
def test_every_block_rounds_keys_and_values(name: str) -> None:
    """Through the architecture's own attention: 8 bits move the logits a little, 2 bits much, and then nothing does."""
    small = tiny(name, torch.float32)
    expected = small.model(IDS, use_cache=False).logits
    errors = []
    for bits in (8, 2):
        with quantized(small.blocks, Scheme.parse(f"w4a16kv{bits}")):
            errors.append(relative_error(expected, small.model(IDS, use_cache=False).logits))
    assert 1e-5 < errors[0] < 0.1 < errors[1]
    assert torch.equal(expected, small.model(IDS, use_cache=False).logits)
    assert {type(part.config) for part in attentions(small.model)} == {type(small.model.config)}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rounding_is_the_same_whether_tokens_are_written_or_read(attention: str) -> None:
    """Decoding token by token with a cache answers as one pass over all tokens."""
    small = tiny("llama", torch.float32)
    small.model.set_attn_implementation(attention)
    with quantized(small.blocks, Scheme.parse("w4a16kv4")):
        whole = small.model(IDS, use_cache=False).logits
        cache, steps = None, []
        for position in range(IDS.shape[1]):
            answer = small.model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            steps.append(answer.logits)
    assert_close("logits", whole, torch.cat(steps, 1), 1e-5)


@torch.no_grad()
def test_hooks_see_what_attention_multiplies() -> None:
    """In order, and without them the module is as it was."""
    small = tiny("llama")
    (attention, *_), seen = attentions(small.model), []
    before = attention.config
    handles = [hook_attention(attention, lambda heads, k=k: seen.append(k) or heads, prepend=k == 0) for k in (1, 0)]
    handles.append(hook_attention(attention, lambda heads: seen.append(heads.query.shape) or heads))
    small.model(IDS, use_cache=False)
    assert seen == [0, 1, (2, 4, 12, 16)] and small.model.config is before
    for handle in handles:
        handle.remove()
    small.model(IDS, use_cache=False)
    assert len(seen) == 3 and attention.config is before


def test_what_cannot_be_rounded_is_refused() -> None:
    for name, scheme, said in (
        ("bloom", "w4a16kv4", "got w4a16kv4 for a model whose attention"),
        ("falcon-7b", "w4a4kv4", "choose a scheme without kv"),
        ("llama", "w4a16kv4x12", "divides a head of 16, got 12 in w4a16kv4x12"),
    ):
        small = tiny(name)
        with pytest.raises(RequestError, match=said):
            attach(small.blocks[0], small.architecture, small.heads, {}, None, Scheme.parse(scheme), torch.float32)
    small = tiny("llama")
    small.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RequestError, match="eager and sdpa attention, got 'flash_attention_2'"):
        hook_attention(attentions(small.model)[0], lambda heads: heads)
