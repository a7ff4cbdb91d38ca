"""Token windows for calibration and evaluation: corpora by name, the user's files, and a cache on disk."""

from __future__ import annotations

from aq_lightning.data.corpora import CORPORA, PYTHON, Corpus, Split, read
from aq_lightning.data.files import TextFile
from aq_lightning.data.protocols import PROTOCOLS, Protocol, protocol_windows
from aq_lightning.data.windows import TokenWindows, calibration_windows, check_windows, evaluation_windows

__all__ = [
    "CORPORA",
    "PROTOCOLS",
    "PYTHON",
    "Corpus",
    "Protocol",
    "Split",
    "TextFile",
    "TokenWindows",
    "calibration_windows",
    "check_windows",
    "evaluation_windows",
    "protocol_windows",
    "read",
]
