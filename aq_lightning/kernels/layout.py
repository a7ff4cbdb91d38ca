"""How integer codes lie in 32-bit words.

Codes ``u_0, u_1, …`` of ``b`` bits, one row, fill int32 words from the least significant bit up:

* **padded**: a word holds ``n = 32 // b`` whole codes. Code ``i`` is at bits ``b·(i mod n) … b·(i mod n) + b − 1`` of
  word ``i // n``; the word's upper ``32 − n·b`` bits are 0. (compressed-tensors up to 0.17.)
* **dense**: a row is one stream of bits. Code ``i`` is at its bits ``b·i … b·i + b − 1``, and bit ``k`` of the stream
  is bit ``k mod 32`` of word ``k // 32``; the bits after the last code are 0. (compressed-tensors from 0.18, vLLM.)

The two are the same for 2, 4 and 8 bits; codes of 3, 5, 6 and 7 bits straddle words in the dense layout only. With 3
bits, most significant bit first::

    padded  word 0 = 00 u9 u8 … u1 u0                word 1 = 00 u19 … u11 u10
    dense   word 0 = u10[1:0] u9 u8 … u1 u0          word 1 = u21[0] u20 … u11 u10[2]
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from aq_lightning.errors import RequestError

Layout = Literal["padded", "dense"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_WORD = 32  # bits


class _Field(NamedTuple):
    """Bits ``skip … skip + width − 1`` of a code, which lie from bit ``shift`` of a word on."""

    code: int
    word: int
    shift: int
    skip: int
    width: int

    @property
    def mask(self) -> int:
        return (1 << self.width) - 1


def words(columns: int, bits: int, layout: Layout) -> int:
    """Number of words that hold a row of ``columns`` codes.

    Raises:
        RequestError: ``bits`` is not 2 to 8, or there is no such layout.
    """
    if not 2 <= bits <= 8:
        raise RequestError(f"Packed codes have 2 to 8 bits, got {bits}: choose a width in that range.")
    if layout not in LAYOUTS:
        raise RequestError(f"A layout is one of {', '.join(LAYOUTS)}, got {layout!r}: use one of these.")
    if layout == "padded":
        return -(-columns // (_WORD // bits))
    return -(-columns * bits // _WORD)


def same_in_both(columns: int, bits: int) -> bool:
    """Whether a row of ``columns`` codes has the same words in both layouts."""
    return _WORD % bits == 0 or columns <= _WORD // bits


def pack_words(codes: Tensor, bits: int, layout: Layout) -> Tensor:
    """Packs rows of codes; the inverse of :func:`unpack_words`.

    Args:
        codes: uint8 (rows, columns), each below ``2^bits``.
        bits: width of a code, 2 to 8.
        layout: see the module.

    Returns:
        int32 (rows, ``words(columns, bits, layout)``).

    Raises:
        RequestError: wrong dtype, rank, width or layout, or a code that does not fit.
    """
    _expect(codes, torch.uint8, "codes")
    rows, columns = codes.shape
    count = words(columns, bits, layout)
    if codes.numel() and int(codes.max()) >> bits:
        raise RequestError(f"Codes of {bits} bits are below {2**bits}, got {int(codes.max())}: use more bits.")
    code_period, word_period = _period(bits, layout)
    periods = -(-columns // code_period)
    codes = functional.pad(codes, (0, periods * code_period - columns)).view(rows, periods, code_period)
    packed = torch.zeros(rows, periods, word_period, dtype=torch.int32, device=codes.device)
    for field in _fields(bits, layout):
        part = (codes[..., field.code].to(torch.int32) >> field.skip) & field.mask  # (rows, periods)
        packed[..., field.word] |= part << field.shift
    return packed.flatten(1)[:, :count].contiguous()


def unpack_words(packed: Tensor, bits: int, columns: int, layout: Layout) -> Tensor:
    """Unpacks rows of words; the inverse of :func:`pack_words`.

    Args:
        packed: int32 (rows, ``words(columns, bits, layout)``).
        bits: width of a code, 2 to 8.
        columns: codes in a row.
        layout: see the module.

    Returns:
        uint8 (rows, columns), each below ``2^bits``.

    Raises:
        RequestError: wrong dtype, rank, width or layout, or another number of words.
    """
    _expect(packed, torch.int32, "words")
    rows, count = packed.shape
    if count != words(columns, bits, layout):
        raise RequestError(
            f"{columns} codes of {bits} bits take {words(columns, bits, layout)} words a row ({layout} layout), "
            f"got {count}: check the number of columns and the layout."
        )
    if 8 % bits == 0:  # whole codes in each byte, of which a word's first is its lowest
        return _unpack_bytes(packed.contiguous().view(torch.uint8), bits)[:, :columns].contiguous()
    code_period, word_period = _period(bits, layout)
    periods = -(-columns // code_period)
    packed = functional.pad(packed, (0, periods * word_period - count)).view(rows, periods, word_period)
    codes = torch.zeros(rows, periods, code_period, dtype=torch.uint8, device=packed.device)
    for field in _fields(bits, layout):
        part = (packed[..., field.word] >> field.shift) & field.mask  # (rows, periods)
        codes[..., field.code] |= (part << field.skip).to(torch.uint8)
    return codes.flatten(1)[:, :columns].contiguous()


def _unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """uint8 (rows, bytes) → uint8 (rows, bytes · 8 / bits); what :func:`_fields` says, without a pass for each field of
    a word."""
    codes = packed.new_empty(*packed.shape, 8 // bits)
    for place in range(8 // bits):
        codes[..., place] = (packed >> (place * bits)) & (2**bits - 1)
    return codes.flatten(1)


def _expect(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise RequestError(
            f"Packing takes {what} as {dtype} (rows, columns), got {tensor.dtype} {tuple(tensor.shape)}: convert first."
        )


def _period(bits: int, layout: Layout) -> tuple[int, int]:
    """Codes and words after which the pattern of bits repeats."""
    return (_WORD // bits, 1) if layout == "padded" else (_WORD, bits)


@cache
def _fields(bits: int, layout: Layout) -> tuple[_Field, ...]:
    """Where the codes of one period lie; a code that straddles two words gives two fields."""
    fields: list[_Field] = []
    for code in range(_period(bits, layout)[0]):
        word, shift = divmod(code * bits, _WORD)
        width = min(bits, _WORD - shift)
        fields.append(_Field(code, word, shift, skip=0, width=width))
        if width < bits:
            fields.append(_Field(code, word + 1, shift=0, skip=width, width=bits - width))
    return tuple(fields)
