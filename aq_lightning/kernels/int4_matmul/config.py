"""How a product is cut into blocks: from a table measured on the same architecture, never measured while serving."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from math import log2
from pathlib import Path

import torch

from aq_lightning.kernels.packed import tiling

_SHARED = 96 * 1024  # bytes of shared memory that a block may have on any GPU since Ampere
_SHIPPED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Config:
    """Sizes of a block and how the compiler treats it."""

    rows: int = 64
    """Rows of the weight in a block."""
    tokens: int = 16
    """Tokens in a block."""
    unroll: int = 1
    """Tiles of columns in a step."""
    splits: int = 1
    """Blocks that share rows and tokens and divide the columns."""
    stages: int = 4
    """Steps whose data are in flight."""
    warps: int = 4
    """Warps of a block."""
    scaled: bool = False
    """Whether scales meet the weight rather than sums of a group."""
    overlap: bool = False
    """Whether it starts before the kernel ahead has ended; Hopper."""
    joined: bool = False
    """Whether chunks that share a scale are one product, so that tensor cores are waited for once, not for each."""
    divided: bool = False
    """Whether warps share rows and tokens and divide the columns, with rounded activations alone; neither ``unroll``,
    ``splits``, ``scaled`` nor ``joined`` matters then."""
    dequantize: bool = False
    """Whether to write the weight in half precision and leave the product to torch; the rest does not matter then."""

    @property
    def options(self) -> dict[str, object]:
        """What the compiler is told beside constants."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            **({"launch_pdl": True} if self.overlap else {}),
        }


@dataclass(frozen=True)
class Product:
    """What a table is asked for."""

    tokens: int
    """M."""
    rows: int
    """N."""
    columns: int
    """K."""
    bits: int
    """Width of a weight's code."""
    activation_bits: int = 16
    """Of an activation; 8 for all that travel as 8."""


@lru_cache(maxsize=4096)
def choose(product: Product, device: torch.device) -> Config:
    """The measured configuration of the nearest product on this architecture, or a rule's where none was measured."""
    table = _table(architecture(device))
    kind = product.bits, product.activation_bits
    same = [entry for entry in table if (entry[0].bits, entry[0].activation_bits) == kind]
    near = [entry for entry in same if entry[0].tokens >= product.tokens] or same
    if not near:
        return rule(product, _processors(device))
    return min(near, key=lambda entry: _distance(entry[0], product))[1]


def rule(product: Product, processors: int) -> Config:
    """Blocks of 64 rows, enough for all processors, that fit any GPU since Ampere; many tokens are left to torch."""
    if product.tokens >= 256 and product.activation_bits == 16:
        return Config(dequantize=True)
    tokens = min(64, max(8, 1 << max(product.tokens - 1, 0).bit_length()))
    blocks = -(-product.rows // 64) * -(-product.tokens // tokens)
    splits = 1
    while splits < 8 and blocks * splits * 2 <= 4 * processors and product.columns // (splits * 2) >= 512:
        splits *= 2
    found = Config(64, tokens, 1, splits, 4, 4, scaled=tokens > 32 and product.activation_bits == 16)
    while found.stages > 2 and shared(found, product) > _SHARED:
        found = replace(found, stages=found.stages - 1)
    return found


def shared(config: Config, product: Product) -> int:
    """Bytes of shared memory that a block takes, about: two bytes an activation, as if none were rounded."""
    tiles = config.warps if config.divided else config.unroll
    columns = tiles * min(256, 32 * tiling(product.bits)[0])
    weights = config.rows * (columns * product.bits // 8 + 4)
    return (config.stages - 1) * weights + config.stages * config.tokens * columns * 2


def save(entries: list[tuple[Product, Config]], path: Path) -> None:
    """Writes a table, one entry a line."""
    ordered = sorted(entries, key=lambda entry: tuple(asdict(entry[0]).values()))
    lines = [json.dumps({**asdict(product), "config": asdict(config)}) for product, config in ordered]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def read(path: Path) -> list[tuple[Product, Config]]:
    """What :func:`save` wrote, in this version or another: configurations with more to them than is known here, or done
    here, are left out."""
    known, found = {field.name for field in fields(Config)}, []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        config = entry.pop("config")
        halves = config.get("divided", False) and entry["activation_bits"] == 16
        if not halves and not any(value for name, value in config.items() if name not in known):
            found.append((Product(**entry), Config(**{n: value for n, value in config.items() if n in known})))
    return found


def _distance(entry: Product, product: Product) -> float:
    """In factors of two: another number of tokens weighs most, since it decides the kind of block."""
    tokens = abs(log2(entry.tokens / max(product.tokens, 1)))
    return 8 * tokens + abs(log2(entry.rows / product.rows)) + abs(log2(entry.columns / product.columns))


def own_table(architecture: str) -> Path:
    """Where configurations measured on this machine are kept; they come before those that ship."""
    root = Path(os.environ.get("AQ_LIGHTNING_CACHE") or "~/.cache/aq_lightning").expanduser()
    return root / "kernels" / f"{architecture}.json"


@cache
def _table(name: str) -> list[tuple[Product, Config]]:
    entries: dict[Product, Config] = {}
    for path in (_SHIPPED / f"{name}.json", own_table(name)):
        entries |= dict(read(path)) if path.is_file() else {}
    return list(entries.items())


@cache
def architecture(device: torch.device) -> str:
    """Of a GPU: ``sm90``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
