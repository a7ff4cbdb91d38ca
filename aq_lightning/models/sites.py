"""Where an equivalence may live in a transformer block: the vocabulary of the architecture files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor


class Group(Enum):
    """A group of maps on the channels of a site that commutes with everything between producer and consumers."""

    SHIFT = "a translation"
    DIAGONAL = "one positive factor per channel"
    ROPE = "one complex factor per rotary pair of each key-value head"
    ROPE_RADIUS = "one positive factor per rotary pair"
    HEAD = "one invertible matrix per key-value head"
    ALL = "a matrix over all channels"


BEHIND_NORM = frozenset({Group.DIAGONAL, Group.SHIFT})
"""What a norm's gain holds, and a shift, which consumers' biases answer for."""
AROUND_ROPE = frozenset({Group.ROPE, Group.ROPE_RADIUS})
"""What commutes with rotary embedding between queries and keys."""
WITHOUT_ROPE = frozenset({Group.DIAGONAL, Group.HEAD, Group.ROPE, Group.ROPE_RADIUS})
"""What lies between queries and keys that are multiplied at once: any matrix, so those of rotary pairs too."""
THROUGH_ATTENTION = frozenset({Group.DIAGONAL, Group.HEAD, Group.SHIFT})
"""What attention's weights carry from values to the output projection: they sum to 1 for each query."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of one model's blocks."""

    query: int
    """Query heads."""
    key_value: int
    """Key-value heads; each serves ``query / key_value`` query heads that follow one another."""
    size: int
    """Channels of a head."""
    rotary: int
    """Channels at the start of each head that rotary embedding turns, if the architecture has one."""


@dataclass(frozen=True)
class Rows:
    """The output rows of a linear that one of its parts owns: ``start … stop`` of ``units`` in each of ``repeats``."""

    repeats: int
    units: int
    start: int
    stop: int

    def read(self, x: Tensor) -> Tensor:
        """(rows, …) → (rows of the part, …)."""
        return x.unflatten(0, (self.repeats, self.units, -1))[:, self.start : self.stop].flatten(0, 2)

    def write(self, x: Tensor, part: Tensor) -> Tensor:
        """(rows, …) with the rows of the part replaced; a new tensor, differentiable in both."""
        units = x.unflatten(0, (self.repeats, self.units, -1))
        own = part.unflatten(0, (self.repeats, self.stop - self.start, -1))
        return torch.cat([units[:, : self.start], own, units[:, self.stop :]], dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Fused:
    """Several linears stacked in the rows of one."""

    parts: tuple[str, ...]
    """Their names, in order."""
    heads: tuple[str, ...] = ()
    """For each part the field of :class:`Heads` that counts its heads; none: all parts are equally wide."""
    interleaved: bool = False
    """Whether each key-value head's rows of all parts lie together, head after head, instead of part after part."""

    def rows(self, part: str, heads: Heads) -> Rows:
        """Where ``part`` lies."""
        repeats = heads.key_value if self.interleaved else 1
        units = [getattr(heads, field) // repeats for field in self.heads] or [1] * len(self.parts)
        index = self.parts.index(part)
        return Rows(repeats, sum(units), sum(units[:index]), sum(units[: index + 1]))


@dataclass(frozen=True)
class Site:
    """One place in a block where a transform ``x' = (x − δ) A⁻¹`` and its inverse cancel.

    The modules are named relative to the block. A producer or dual that is one part of a fused linear is named
    ``linear:part`` (see :attr:`Architecture.fused`); consumers are read whole.
    """

    name: str
    """Name in recipes and reports."""
    producer: str
    """Norm or linear whose output is multiplied by ``A⁻¹``."""
    consumers: tuple[str, ...] = ()
    """Linears that read the transformed activation: their weights become ``W Aᵀ``. A router comes before experts."""
    dual: str = ""
    """Norm or linear whose output is multiplied by ``Aᵀ`` instead (keys: queries times keys must not change)."""
    absorbs: frozenset[Group] = frozenset({Group.DIAGONAL})
    """Which maps fold here at no run-time cost; any other is refused."""
    per_head: bool = False
    """Whether the channels are heads, and the map is shared by the query heads of one key-value head."""
    per_expert: bool = False
    """Whether the channels are those inside the experts: each expert has its own, and its own map."""

    def columns(self, weight: Tensor) -> Tensor:
        """A consumer's weight (…, in) → (…, channels of the site)."""
        return weight.transpose(0, 1).flatten(1) if self.per_expert else weight

    def from_columns(self, columns: Tensor, weight: Tensor) -> Tensor:
        """The inverse of :meth:`columns`, in the shape of ``weight``."""
        return columns.unflatten(1, (weight.shape[0], -1)).transpose(0, 1) if self.per_expert else columns


@dataclass(frozen=True)
class SiteShape:
    """Channels of a site as ``blocks`` independent blocks of ``size`` channels.

    A member of the site with ``blocks · group · size`` channels repeats each block's map ``group`` times: under
    grouped-query attention the output projection reads each key-value head once per query head of its group.
    """

    blocks: int
    size: int
    rotary: int | None = None
    """Channels at the start of each block that rotary embedding turns, in pairs; None: all."""
    group: int = 1
    """Query heads that share a block's map, where consumers read heads."""
    dual: bool = False
    """Whether it lies between queries and keys."""

    @property
    def channels(self) -> int:
        """Channels of the narrowest member; consumers read ``group`` times as many."""
        return self.blocks * self.size

    def split(self, x: Tensor) -> Tensor:
        """(…, blocks · group · size) → (…, blocks, group, size)."""
        return x.unflatten(-1, (self.blocks, -1, self.size))

    @staticmethod
    def join(x: Tensor) -> Tensor:
        """(…, blocks, group, size) → (…, blocks · group · size)."""
        return x.flatten(-3)


@dataclass(frozen=True)
class Member:
    """One side of a site: a module of the block, the stacked linears of its experts, or one part of a fused linear."""

    module: str
    """Path relative to the block."""
    rows: Rows | None = None
    """Output rows that belong to it; None: all."""
    stacked: bool = False
    """Whether it is a parameter (experts, out, in) instead of a module with a weight."""

    @property
    def weight(self) -> str:
        """Name of its weight in the block."""
        return self.module if self.stacked else f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """Name of its bias."""
        return f"{self.module}.bias"

    def read(self, x: Tensor) -> Tensor:
        """(rows, …) of the module → (rows of the member, …), of stacked linears expert after expert."""
        rows = self._rows(x)
        x = x.flatten(0, 1) if self.stacked else x
        return x if rows is None else rows.read(x)

    def write(self, x: Tensor, own: Tensor) -> Tensor:
        """(rows, …) of the module with the member's rows replaced."""
        rows = self._rows(x)
        flat = x.flatten(0, 1) if self.stacked else x
        return (own if rows is None else rows.write(flat, own)).reshape(x.shape)

    def _rows(self, x: Tensor) -> Rows | None:
        return replace(self.rows, repeats=len(x)) if self.stacked and self.rows is not None else self.rows


@dataclass(frozen=True)
class Architecture:
    """What the engine must know of a model type: data only."""

    blocks: str
    """Path of the list of blocks in the causal language model."""
    sites: tuple[Site, ...]
    """Sites of one block, producers before consumers."""
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Config switch → the linears that it gives a bias, all together. A linear without a bias and without a switch
    cannot take one."""
    requires: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Config field → the values for which these data are true; a model with another is refused by name."""
    fused: Mapping[str, Fused] = field(default_factory=lambda: MappingProxyType({}))
    """Linear → the parts stacked in its rows."""
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Parameter (experts, out, in), which stacks a linear of every expert → where checkpoints keep one expert's rows,
    in order and equally many: paths of linears relative to the block, with ``*`` for the expert's number."""
    stored: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Module of a block, or of the model around them → its path in checkpoints, where that is another."""
    attention: str = ""
    """The module that multiplies queries and keys, if transformers lets a function be named for it; empty: nothing is
    online there, and keys and values stay in full precision."""
    final_norm: str = ""
    """The norm before the output head, if the stream between blocks can be rotated: every norm divides by a root mean
    square alone, and only embeddings and linears write to the stream; empty: it cannot."""
    heads: str = "num_attention_heads"
    """Config field with the number of query heads."""
    key_value_heads: str | int = "num_key_value_heads"
    """Config field with the number of key-value heads, or the number itself."""
    gain_offset: float = 0.0
    """What a norm adds to its weight before it multiplies (1 where the stored weight is the gain's excess over 1)."""
    returns_tuple: bool = False
    """Whether a block answers a tuple that starts with the hidden states."""
    per_sample: tuple[str, ...] = ()
    """Arguments of a block whose first dimension counts samples and does not broadcast."""

    def member(self, name: str, heads: Heads) -> Member:
        """The side of a site that ``name`` names: a module, or ``linear:part``."""
        module, _, part = name.partition(":")
        rows = self.fused[module].rows(part, heads) if part else None
        return Member(module, rows, stacked=module in self.experts)
