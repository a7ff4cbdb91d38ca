"""Packing is lossless and follows its byte specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.kernels.layout import LAYOUTS, Layout, pack_words, same_in_both, unpack_words, words

BITS = st.integers(2, 8)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def pack_bit_by_bit(codes: Tensor, bits: int, layout: Layout) -> list[list[int]]:
    """The specification, read aloud: unsigned words."""
    rows = []
    for row in codes.tolist():
        out = [0] * words(len(row), bits, layout)
        for i, code in enumerate(row):
            for bit in range(bits):
                if layout == "padded":
                    word, place = i // (32 // bits), bits * (i % (32 // bits)) + bit
                else:
                    word, place = divmod(bits * i + bit, 32)
                out[word] |= (code >> bit & 1) << place
        rows.append(out)
    return rows


@settings(deadline=None, max_examples=200)
@given(BITS, st.sampled_from(LAYOUTS), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_follows_the_specification_and_inverts(bits: int, layout: Layout, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_words(codes, bits, layout)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert (packed.long() & 0xFFFFFFFF).tolist() == pack_bit_by_bit(codes, bits, layout)
    assert torch.equal(unpack_words(packed, bits, columns, layout), codes)


@settings(deadline=None)
@given(BITS, st.integers(1, 70), st.integers(0, 99))
def test_layouts_agree_exactly_where_said(bits: int, columns: int, seed: int) -> None:
    codes = random_codes(3, columns, bits, seed) | 1 << bits - 1  # the top bit set: a moved code is always seen
    padded, dense = (pack_words(codes, bits, layout) for layout in LAYOUTS)
    assert torch.equal(padded, dense) == same_in_both(columns, bits)


def test_transposed_codes_and_empty_rows() -> None:
    codes = random_codes(7, 12, 3, 0)
    for layout in LAYOUTS:
        assert torch.equal(pack_words(codes.T, 3, layout), pack_words(codes.T.contiguous(), 3, layout))
        assert pack_words(codes[:, :0], 3, layout).shape == (7, 0)
        assert unpack_words(pack_words(codes[:0], 3, layout), 3, 12, layout).shape == (0, 12)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_padded_equals_compressed_tensors(bits: int, dim: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = random_codes(37, 53, bits, bits)
    theirs = pack_to_int32((codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), bits, packed_dim=dim)
    ours = pack_words(codes, bits, "padded") if dim == 1 else pack_words(codes.T, bits, "padded").T
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: words(8, 1, "dense"), "2 to 8 bits, got 1"),
        (lambda: words(8, 4, "loose"), "got 'loose'"),
        (lambda: pack_words(torch.zeros(2, 8), 4, "dense"), r"uint8 \(rows, columns\), got torch.float32 \(2, 8\)"),
        (lambda: pack_words(torch.zeros(8, dtype=torch.uint8), 4, "dense"), r"got torch.uint8 \(8,\)"),
        (lambda: pack_words(torch.full((1, 8), 16, dtype=torch.uint8), 4, "dense"), "below 16, got 16"),
        (lambda: unpack_words(torch.zeros(2, 8, dtype=torch.int64), 4, 64, "dense"), "got torch.int64"),
        (lambda: unpack_words(torch.zeros(2, 3, dtype=torch.int32), 3, 32, "padded"), "take 4 words a row .* got 3"),
    ],
)
def test_refusals(request_, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        request_()
