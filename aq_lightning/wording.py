"""How quantities are said to people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
