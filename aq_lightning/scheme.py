"""Which tensors become which integers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aq_lightning.errors import RequestError

_NAME = re.compile(
    r"w(?P<weight>\d+)a(?P<activation>\d+)(?:kv(?P<cache>\d+)(?P<static>static)?(?:x(?P<run>\d+))?)?(?:g(?P<group>\d+))?(?P<symmetry>sym)?"
)
_FULL_PRECISION = 16


@dataclass(frozen=True)
class Grid:
    """A uniform integer grid: codes ``0 … 2^bits − 1`` with one scale and zero point per group.

    The arithmetic of the grid is in :mod:`aq_lightning.qtensor`.
    """

    bits: int
    """Width of one code, 2 to 8 bits."""
    group_size: int | None = None
    """Consecutive input channels that share a scale; None: one scale for each output channel (or token)."""
    symmetric: bool = False
    """Whether the zero point is fixed at the middle code ``2^(bits − 1)``."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RequestError(f"An integer grid has 2 to 8 bits, got {self.bits}: choose a width in that range.")
        if self.group_size is not None and self.group_size < 1:
            raise RequestError(f"A group has at least 1 channel, got {self.group_size}: use null for per-channel.")

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 2**self.bits

    def groups(self, width: int) -> int:
        """Number of groups in a row of ``width`` channels.

        Raises:
            RequestError: ``width`` is no multiple of the group size.
        """
        size = self.group_size or width
        if width % size:
            divisors = [n for n in (32, 64, 128, 256) if width % n == 0]
            raise RequestError(
                f"The group size must divide the {width} input channels of every linear, got {size}: "
                f"use {' or '.join(map(str, divisors)) or 'a divisor'}, or per-channel (no g in the scheme's name)."
            )
        return width // size


@dataclass(frozen=True)
class Scheme:
    """Integers of the weights and, where asked for, of the activations entering each linear.

    Activations are quantized dynamically, one scale per token; so are keys and values, one scale per token and head,
    unless their scales are static.
    Embeddings and the output head stay in full precision.
    """

    weight: Grid
    """Grid of every linear weight inside the blocks."""
    activation: Grid | None = None
    """Grid of each linear's input, per token; None leaves activations in full precision."""
    key_value: Grid | None = None
    """Grid of keys, as attention multiplies them, and of values, per token and head or, with a group size, per run of
    so many channels of a head; None leaves the cache in full precision."""
    static_cache: bool = False
    """Whether the scales of keys and values come from calibration and are the same for all tokens."""

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation.group_size is not None:
            raise RequestError("Activations are quantized per token: set activation.group_size to null.")
        if self.key_value is not None and self.key_value.symmetric:
            raise RequestError("Keys and values have asymmetric grids: set key_value.symmetric to false.")
        if self.static_cache and self.key_value is None:
            raise RequestError("Static scales are those of keys and values, got none rounded: set static_cache false.")

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Reads ``w{bits}a{bits}[kv{bits}[static][x{run}]][g{group}][sym]``, for example ``w4a16``, ``w3a16g64``,
        ``w4a4kv4``, ``w4a16g128sym``.

        ``a16`` leaves activations in full precision, and without ``kv`` the cache stays so; without ``x`` a token has
        one scale per head there, and with ``static`` all tokens have the same; without ``g`` weights have one scale per
        output channel; ``sym`` makes weights symmetric. Activations are symmetric, as serving engines require, keys and
        values asymmetric.

        Raises:
            RequestError: the name does not have that form, or a width is out of range.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise RequestError(
                f"A scheme is named w<bits>a<bits>[kv<bits>[static][x<run>]][g<group size>][sym], got {name!r}: "
                "for example w4a16, w3a16g64, w4a4, w4a4kv4 or w4a16g128sym."
            )
        group = int(match["group"]) if match["group"] else None
        bits = int(match["activation"])
        run = int(match["run"]) if match["run"] else None
        return cls(
            weight=Grid(int(match["weight"]), group, symmetric=match["symmetry"] is not None),
            activation=None if bits == _FULL_PRECISION else Grid(bits, symmetric=True),
            key_value=None if match["cache"] is None else Grid(int(match["cache"]), run),
            static_cache=match["static"] is not None,
        )

    def __str__(self) -> str:
        group = "" if self.weight.group_size is None else f"g{self.weight.group_size}"
        bits = _FULL_PRECISION if self.activation is None else self.activation.bits
        return f"w{self.weight.bits}a{bits}{self._cache()}{group}{'sym' if self.weight.symmetric else ''}"

    def _cache(self) -> str:
        if self.key_value is None:
            return ""
        run = "" if self.key_value.group_size is None else f"x{self.key_value.group_size}"
        return f"kv{self.key_value.bits}{'static' if self.static_cache else ''}{run}"
