"""How quantities and differences are said to people."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"


def divergences(metrics: Mapping[str, Any]) -> str:
    """Of a model whose scales were tuned, before and after."""
    values = (metrics["divergence"][when] for when in ("before", "after"))
    return " → ".join("not finite" if value is None else f"{value:.3g}" for value in values)


def changed_lines(before: str, after: str) -> list[str]:
    """Changed lines of two texts, as ``- old`` and ``+ new``."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [f"{line[0]} {line[1:].strip()}" for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
