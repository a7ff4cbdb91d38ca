"""Packing for the kernels is lossless and follows its specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import random_weight
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.kernels.packed import ROWS, PackedWeight, grids, tiling

SIZES = st.sampled_from([(1, None), (2, 16), (3, 32), (1, 128), (2, 64), (3, 48)])


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.integers(1, 130), SIZES, st.booleans(), st.integers(1, 99))
def test_round_trip(bits: int, rows: int, groups: tuple[int, int | None], symmetric: bool, columns: int) -> None:
    count, size = groups
    weight = random_weight(rows, columns if size is None else count * size, bits, size, symmetric)
    packed = PackedWeight.pack(weight)
    again = packed.unpack()
    assert packed.shape == weight.codes.shape
    assert again.grid == weight.grid
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(again, name), getattr(weight, name)), name


def code_at(words: Tensor, bits: int, row: int, column: int) -> int:
    """The specification, read aloud."""
    codes, chunk = tiling(bits)[0], words.shape[4]
    tile, place = divmod(column, codes * chunk)
    i, c = divmod(place, chunk)
    planes = words[row // ROWS, tile, :, row % ROWS, c].tolist()
    string = sum((word & 0xFFFF) << 16 * plane for plane, word in enumerate(planes))
    return string >> bits * i & 2**bits - 1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [16, 32, 64])
def test_follows_the_specification(bits: int, size: int) -> None:
    weight = random_weight(67, 3 * size, bits, size, False)
    words = PackedWeight.pack(weight).words
    assert words.dtype == torch.int16 and words.is_contiguous() and size % words.shape[4] == 0
    for row in (0, 1, 63, 64, 66):
        codes = [code_at(words, bits, row, column) for column in range(3 * size)]
        assert codes == weight.codes[row].tolist()


def test_a_scale_and_its_zero_point_share_a_word() -> None:
    for storage in (torch.float16, torch.bfloat16):
        weight = random_weight(4, 64, 8, 32, False, storage)
        weight.scale.view(-1)[:3] = torch.tensor([torch.finfo(storage).tiny / 4, 0.0, float("inf")])
        packed = PackedWeight.pack(weight)
        scale, zero = grids(packed.scales)
        assert torch.equal(scale.T, weight.scale.float()) and torch.equal(zero.T, weight.zero)
        assert packed.unpack().scale.dtype == storage


def test_scales_of_more_than_16_bits_are_refused() -> None:
    with pytest.raises(RequestError, match="have 16 bits, got torch.float32"):
        PackedWeight.pack(random_weight(4, 64, 4, 32, True, torch.float32))


def test_groups_that_no_chunk_fits_are_refused() -> None:
    with pytest.raises(RequestError, match="multiples of 16 columns, got 24"):
        PackedWeight.pack(random_weight(4, 48, 4, 24, False))


def test_codes_that_do_not_fit_are_refused() -> None:
    weight = random_weight(4, 64, 4, 32, True)
    weight.codes[1, 2] = 16
    with pytest.raises(RequestError, match="4 bits are below 16, got 16"):
        PackedWeight.pack(weight)
