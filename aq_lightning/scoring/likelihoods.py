"""Likelihoods of what follows a context, for many pairs at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from aq_lightning.evaluation.harness import Pair
from aq_lightning.scoring.answers import Answers

_STEP = 16  # lengths are rounded up to multiples of it, so that few shapes occur
_PASS = 2**31  # bytes of what enters a block in one pass through all of them


@dataclass(frozen=True)
class _Row:
    """What the model reads once, and what is asked of its logits."""

    tokens: tuple[int, ...]
    asked: list[tuple[int, list[int]]] = field(default_factory=list)
    """Number of a pair, and its tokens behind the context; they end one behind the row's."""


def likelihoods(answers: Answers, pairs: Sequence[Pair], longest: int, tokens: int = 2048) -> list[tuple[float, bool]]:
    """The logarithm of the probability of what follows each context, in nats, and whether each of its tokens is the
    likeliest.

    Equal rows are read once: of answers of one token to the same question, all. What is beyond ``longest`` is cut off
    at the left, as lm-eval does. Rows are padded at the right, which causal models do not see.

    Args:
        answers: the model.
        pairs: tokens of contexts, and of what follows.
        longest: tokens that the model can read.
        tokens: read in one batch.
    """
    rows: dict[tuple[int, ...], _Row] = {}
    for number, (context, following) in enumerate(pairs):
        read = tuple([*context, *following][-longest - 1 : -1])
        rows.setdefault(read, _Row(read)).asked.append((number, following[-len(read) :]))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for part in _passes(sorted(rows.values(), key=lambda row: len(row.tokens)), answers.width):
        groups = [list(group) for _, group in groupby(part, key=lambda row: _padded(len(row.tokens)))]
        windows = [_window(group) for group in groups]
        ordered = iter(row for group in groups for row in group)
        for logits in answers.logits(windows, tokens):
            for answer in logits:
                row = next(ordered)
                for number, following in row.asked:
                    found[number] = _likelihood(answer[: len(row.tokens)], following)
    return found


def _likelihood(logits: Tensor, following: list[int]) -> tuple[float, bool]:
    """Of the last tokens that logits (length, vocabulary) predict."""
    if not following:
        return 0.0, True
    logits = logits[-len(following) :].float().log_softmax(-1)
    wanted = torch.tensor(following, device=logits.device)
    return float(logits.gather(-1, wanted[:, None]).double().sum()), bool((logits.argmax(-1) == wanted).all())


def _passes(rows: Sequence[_Row], width: int) -> Iterator[list[_Row]]:
    """Rows whose hidden states may be kept at the same time."""
    part: list[_Row] = []
    numbers = 0
    for row in rows:
        added = width * _padded(len(row.tokens))
        if part and 4 * (numbers + added) > _PASS:
            yield part
            part, numbers = [], 0
        part.append(row)
        numbers += added
    if part:
        yield part


def _padded(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _window(rows: Sequence[_Row]) -> Tensor:
    """int64 (rows, length), zeros behind the ends."""
    window = torch.zeros(len(rows), _padded(len(rows[0].tokens)), dtype=torch.int64)
    for each, row in zip(window, rows, strict=True):
        each[: len(row.tokens)] = torch.tensor(row.tokens)
    return window
