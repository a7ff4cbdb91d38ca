"""Texts on which papers state perplexity, each cut as their published code cuts it.

The names are GPTQ's (github.com/IST-DASLab/gptq, datautils.py), from which OmniQuant, AffineQuant and others took them;
``-old`` is what its ``ptb`` and ``c4`` are, which a bare name would leave open. Tables of one paper mix them freely.
One difference is left: no token of the tokenizer's own (LLaMA's ``<s>``) is put before a text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aq_lightning.data.corpora import documents, read
from aq_lightning.data.files import TextFile
from aq_lightning.data.tokens import tokenize
from aq_lightning.data.windows import evaluation_windows
from aq_lightning.errors import RequestError

_CROPS = 256  # windows of both variants of C4


@dataclass(frozen=True)
class Protocol:
    """Rows of a corpus, and how windows are cut from them."""

    corpus: str
    """Name in :data:`aq_lightning.data.CORPORA`."""
    rows: str
    """Split, as ``datasets`` writes it."""
    separator: str | None
    """Stands between rows of one text that is cut into consecutive windows; None: random crops of single rows."""
    windows: int | None = None
    """At most so many; None: all."""
    file: str | None = None
    """Of the repository, where the corpus names none for that split."""


PROTOCOLS: dict[str, Protocol] = {
    "wikitext2": Protocol("wikitext2", "test", "\n\n"),
    "ptb-old": Protocol("ptb", "validation", "\n\n"),
    "ptb-new": Protocol("ptb", "test", " ", file="penn_treebank/test/*.parquet"),
    "c4-old": Protocol("c4", "validation", None, _CROPS),
    "c4-new": Protocol("c4", "validation[:1100]", " ", _CROPS),
}


def protocol_windows(name: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None) -> Tensor:
    """Evaluation windows of a protocol, or of a user's file, which is read whole.

    Args:
        name: in :data:`PROTOCOLS`, or the path of a file as :class:`TextFile` reads it, or ``python``.
        tokenizer: the model's.
        length: tokens of a window; the papers' is 2048.
        limit: at most so many windows; None: as the protocol has it.

    Returns:
        int64 (windows, length).

    Raises:
        RequestError: an unknown name, or a text that cannot be had or is too short.
    """
    protocol = PROTOCOLS.get(name)
    if protocol is None:
        variants = [each for each in PROTOCOLS if each.startswith(f"{name}-")]
        if variants:
            raise RequestError(f"Papers mean one of two texts, got {name!r}: name {' or '.join(variants)}.")
        if name != "python" and TextFile.find(name) is None:
            raise RequestError(
                f"Perplexity is of {', '.join(PROTOCOLS)}, python or an existing file of text, got {name!r}: check it."
            )
        return evaluation_windows(tokenize(tokenizer, read(name, "evaluation")), length, limit)
    most = min((each for each in (limit, protocol.windows) if each is not None), default=None)
    rows = documents(protocol.corpus, protocol.rows, protocol.file)
    if protocol.separator is None:
        return crops(rows, lambda row: tokenize(tokenizer, row), length, most or _CROPS)
    return evaluation_windows(tokenize(tokenizer, protocol.separator.join(rows)), length, most)


def crops(rows: list[str], tokens: Callable[[str], Tensor], length: int, count: int) -> Tensor:
    """Random windows as GPTQ's ``c4`` draws them: rows uniformly until one is long enough, then an offset in it, by
    Python's generator from seed 0.

    Args:
        rows: documents.
        tokens: of a document, int64 (tokens,).
        length: tokens of a window.
        count: windows.

    Returns:
        int64 (count, length).

    Raises:
        RequestError: no document is longer than a window.
    """
    generator, drawn = random.Random(0), []
    misses = 0
    while len(drawn) < count:
        row = tokens(rows[generator.randint(0, len(rows) - 1)])
        if len(row) > length:
            offset = generator.randint(0, len(row) - length - 1)
            drawn.append(row[offset : offset + length])
            misses = 0
        elif (misses := misses + 1) > 100 * len(rows):
            raise RequestError(f"A crop of {length} tokens needs a longer document, got none: lower the length.")
    return torch.stack(drawn)
