r"""How a quantized weight lies in memory for matrix products: tiles that are read whole, codes that unpack in place.

A weight W of shape (N, K) is cut into tiles of 64 rows and ``span`` columns, padded at the bottom and on the right. A
tile is a run of ``b / gcd(16, b)`` planes of 16-bit words, each plane (64, chunk), ``span = chunk · 16 / gcd(16, b)``:

* The ``codes = 16 / gcd(16, b)`` codes of one row that lie ``chunk`` columns apart, ``column = chunk · i + c`` with
  ``i = 0 … codes − 1``, are one string of bits, code i at bits ``b·i … b·i + b − 1``; the string's p-th 16 bits are
  word ``(row, c)`` of plane p.

So one plane of words is loaded as if it were a 16-bit operand of a matrix product, and code i of all its words, shifted
and masked, *is* that operand for the columns ``chunk · i … chunk · (i + 1) − 1``: nothing moves between threads. A word
holds 4 codes of 4 bits, 8 of 2 bits, 2 of 8 bits; 16 codes of 3 bits are 3 words. Groups are whole chunks, so that each
operand has one scale and zero point a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid

ROWS = 64
"""Rows of a tile."""
_CHUNKS = (32, 16)
_ZERO = 0xFF  # the bits of a zero point
_SPAN = 256  # columns of a tile at most: what a kernel holds of the activations at once
_WORD = 16  # bits


class Operands(NamedTuple):
    """A packed weight as an operator gets it; fields as in :class:`PackedWeight`."""

    words: Tensor
    scales: Tensor
    bits: int

    @property
    def span(self) -> int:
        """Columns of a tile."""
        return tiling(self.bits)[0] * self.words.shape[4]


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight of N rows and K columns in G groups, as tensors that a module holds as buffers."""

    words: Tensor
    """int16 (⌈N / 64⌉, ⌈K / span⌉, planes, 64, chunk): see the module."""
    scales: Tensor
    """int32 (G, N): the scale as the bits of a float32, whose lowest 8, which no 16-bit number needs, are the zero
    point."""
    grid: Grid
    """Bits, group size and symmetry."""
    storage: torch.dtype
    """Of the scales in the checkpoint."""
    shape: tuple[int, int]
    """(N, K)."""

    @staticmethod
    def pack(weight: QTensor) -> PackedWeight:
        """The same weight in tiles; the inverse of :meth:`unpack`.

        Raises:
            RequestError: the groups are no multiples of 16 columns, a code does not fit its bits, or a scale does not
                fit 16 bits.
        """
        (rows, columns), bits = weight.codes.shape, weight.grid.bits
        codes, planes = tiling(bits)
        chunk = _chunk(columns // weight.scale.shape[1], weight.scale.shape[1], codes)
        down, across = -(-rows // ROWS), -(-columns // (chunk * codes))
        padded = weight.codes.new_zeros(down * ROWS, across * chunk * codes)
        padded[:rows, :columns] = weight.codes
        words = _join(padded.view(down, ROWS, across, codes, chunk).transpose(1, 2), bits)
        scales = weight.scale.T.float().contiguous().view(torch.int32)  # (G, N)
        if bool((scales & _ZERO).any()):
            raise RequestError(f"Scales of a packed weight have 16 bits, got {weight.scale.dtype}: convert them first.")
        return PackedWeight(words, scales | weight.zero.T.int(), weight.grid, weight.scale.dtype, (rows, columns))

    def unpack(self) -> QTensor:
        """The weight as codes, scales and zero points."""
        codes = unpack_codes(self.words, self.grid.bits)[: self.shape[0], : self.shape[1]].contiguous()
        scale, zero = grids(self.scales)
        return QTensor(codes, scale.T.to(self.storage).contiguous(), zero.T.contiguous(), self.grid)


def tiling(bits: int) -> tuple[int, int]:
    """Codes in a string of bits, and 16-bit words that hold it."""
    return _WORD // gcd(_WORD, bits), bits // gcd(_WORD, bits)


def _join(codes: Tensor, bits: int) -> Tensor:
    """uint8 (down, across, 64, codes, chunk) → words, int16 (down, across, planes, 64, chunk)."""
    if codes.numel() and int(codes.max()) >> bits:
        raise RequestError(f"Codes of {bits} bits are below {2**bits}, got {int(codes.max())}: use more bits.")
    planes = [torch.zeros_like(codes[:, :, :, 0], dtype=torch.int32) for _ in range(tiling(bits)[1])]
    for code in range(codes.shape[3]):
        place, shift = divmod(bits * code, _WORD)
        part = codes[:, :, :, code].to(torch.int32)  # (down, across, 64, chunk)
        planes[place] |= part << shift
        if shift + bits > _WORD:
            planes[place + 1] |= part >> _WORD - shift
    return torch.stack(planes, 2).to(torch.int16)  # the low 16 bits


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Codes of a weight with its padding, uint8 (rows, columns).

    Args:
        words: as in :class:`PackedWeight`.
        bits: width of a code.
    """
    codes = tiling(bits)[0]
    down, across, planes, rows, chunk = words.shape
    unpacked = words.new_empty(down, rows, across, codes, chunk, dtype=torch.uint8)
    for code in range(codes):
        place, shift = divmod(bits * code, _WORD)
        part = (words[:, :, place].to(torch.int32) & 0xFFFF) >> shift  # (down, across, rows, chunk)
        if shift + bits > _WORD:
            part |= words[:, :, place + 1].to(torch.int32) << _WORD - shift
        unpacked[:, :, :, code] = (part & 2**bits - 1).to(torch.uint8).transpose(1, 2)
    return unpacked.view(down * rows, across * codes * chunk)


def grids(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales, float32, and zero points, uint8, of the shape of ``scales`` as in :class:`PackedWeight`."""
    return (scales & ~_ZERO).view(torch.float32), (scales & _ZERO).to(torch.uint8)


def expect(x: Tensor, words: Tensor, scales: Tensor, bits: int, bias: Tensor | None) -> None:
    """Refuses activations, packed tensors or bias that do not fit each other, naming the fix."""
    allowed = (torch.float16, torch.bfloat16) + ((torch.float32,) if x.device.type == "cpu" else ())
    if x.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise RequestError(f"Activations on {x.device.type} are {names}, got {x.dtype}: convert them with .to(…).")
    for name, tensor in {"words": words, "scales": scales, "bias": bias}.items():
        if tensor is not None and tensor.device != x.device:
            raise RequestError(f"{name} are on {tensor.device}, activations on {x.device}: move them to one device.")
    for name, tensor, dtype, rank in (("words", words, torch.int16, 5), ("scales", scales, torch.int32, 2)):
        if tensor.dtype != dtype or tensor.ndim != rank or not tensor.is_contiguous():
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise RequestError(f"{name} are those of PackedWeight.pack, contiguous, got {got}: pack the weight again.")
    codes, planes = tiling(bits)
    groups, rows = scales.shape
    columns, span = x.shape[-1], codes * words.shape[4]
    expected = -(-rows // ROWS), -(-columns // span), planes, ROWS
    if words.shape[:4] != expected or columns % groups or (groups > 1 and columns // groups % words.shape[4]):
        raise RequestError(
            f"A weight of {rows} rows, {groups} groups and {bits} bits for {columns} channels has words "
            f"{(*expected, words.shape[4])}, got {tuple(words.shape)}: check the activations' last size and the bits."
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise RequestError(f"bias has shape {(rows,)}, got {tuple(bias.shape)}: give that of the same weight.")
    if bias is not None and not bias.is_contiguous():
        raise RequestError(f"bias is contiguous, got strides {bias.stride()}: call .contiguous() on it.")


def _chunk(size: int, groups: int, codes: int) -> int:
    """Columns of a plane: the most that no group breaks and whose tile is not too wide."""
    for chunk in _CHUNKS:
        if codes * chunk <= _SPAN and (groups == 1 or size % chunk == 0):
            return chunk
    raise RequestError(
        f"Groups of a packed weight are multiples of {_CHUNKS[-1]} columns, got {size}: "
        "quantize with groups of 32, 64 or 128, or per channel."
    )
