"""AffineQuant calibration of transformers on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aq_lightning.api import Quantized as Quantized
    from aq_lightning.api import quantize as quantize

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``quantize`` and ``Quantized``, imported when they are first used: torch takes seconds."""
    if name in ("quantize", "Quantized"):
        return getattr(import_module("aq_lightning.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
