"""Where an equivalence may live in a transformer block: the vocabulary of the architecture files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from torch import Tensor


class Group(Enum):
    """A group of maps on the channels of a site that commutes with everything between producer and consumers."""

    SHIFT = "a translation"
    DIAGONAL = "one factor per channel"
    ROPE = "one complex factor per rotary pair of each key-value head"
    HEAD = "one invertible matrix per key-value head"


@dataclass(frozen=True)
class Site:
    """One place in a block where a transform ``x' = (x − δ) A⁻¹`` and its inverse cancel.

    The modules are named relative to the block.
    """

    name: str
    """Name in recipes and reports."""
    producer: str
    """Norm or linear whose output is multiplied by ``A⁻¹``."""
    consumers: tuple[str, ...] = ()
    """Linears that read the transformed activation: their weights become ``W Aᵀ``."""
    dual: str = ""
    """Linear whose output is multiplied by ``Aᵀ`` instead (keys, whose product with the queries must not change)."""
    absorbs: frozenset[Group] = frozenset({Group.DIAGONAL})
    """Which maps fold here at no run-time cost; any other is refused."""
    per_head: bool = False
    """Whether the channels are heads, and the map is shared by the query heads of one key-value head."""


@dataclass(frozen=True)
class SiteShape:
    """Channels of a site as ``blocks`` independent blocks of ``size`` channels.

    A member of the site with ``blocks · group · size`` channels repeats each block's map ``group`` times: under
    grouped-query attention the output projection reads each key-value head once per query head of its group.
    """

    blocks: int
    size: int

    @property
    def channels(self) -> int:
        """Channels of the narrowest member."""
        return self.blocks * self.size

    def split(self, x: Tensor) -> Tensor:
        """(…, blocks · group · size) → (…, blocks, group, size)."""
        return x.unflatten(-1, (self.blocks, -1, self.size))

    @staticmethod
    def join(x: Tensor) -> Tensor:
        """(…, blocks, group, size) → (…, blocks · group · size)."""
        return x.flatten(-3)


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
    heads: str = "num_attention_heads"
    """Config field with the number of query heads."""
