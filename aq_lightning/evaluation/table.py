"""The final table, on screen and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One model of a comparison."""

    model: str
    """What it is."""
    perplexity: float
    """On the evaluation windows."""
    bits: float
    """Effective bits per weight of the linears in the blocks: codes, scales, zero points, biases, online products."""
    overhead: float = 0.0
    """Multiply–adds per token of online products, in percent of those of the linears in the blocks."""

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def render(rows: Sequence[Row]) -> str:
    """Aligned text, one line per model; the overhead has a column where some model has one."""
    width = max(len(row.model) for row in rows)
    lines = [f"{'model':<{width}}  {'perplexity':>10}  {'bits/weight':>11}"]
    lines += [f"{row.model:<{width}}  {_figure(row.perplexity):>10}  {row.bits:>11.3f}" for row in rows]
    if any(row.overhead for row in rows):
        ends = ["multiply–adds", *(f"+{row.overhead:.2f} %" for row in rows)]
        lines = [f"{line}  {end:>13}" for line, end in zip(lines, ends, strict=True)]
    return "\n".join(lines)


def _figure(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.2e}"
