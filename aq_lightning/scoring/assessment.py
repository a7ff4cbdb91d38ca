"""Everything that is measured of one model: perplexity, divergence from a reference, tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any

from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.evaluation import Sample, Score, Scored, agreements, ask, divergences, window_losses
from aq_lightning.scoring.answers import batches
from aq_lightning.scoring.likelihoods import likelihoods
from aq_lightning.scoring.opening import Opened

DIVERGENCE, AGREEMENT = "KL", "top-1"


@dataclass(frozen=True)
class Assessment:
    """What every model of a table is asked."""

    texts: Mapping[str, Tensor] = field(default_factory=dict)
    """Windows by the name of their text, int64 (windows, length)."""
    tasks: Sequence[str | dict[str, Any]] = ()
    """As :func:`aq_lightning.evaluation.check_tasks` gives them."""
    shots: int | None = None
    """Examples before each question; None: as each task has it."""
    limit: int | None = None
    """Questions of each task; None: all."""
    tokens: int = 2048
    """Of text read at a time."""

    def of(self, opened: Opened, reference: Opened | None = None) -> Scored:
        """All scores of one model.

        Args:
            opened: the model.
            reference: the model in full precision; its predictions on the first text are what the other's are held
                against: mean Kullback–Leibler divergence (nats per token) and share of tokens that both hold likeliest.

        Raises:
            RequestError: the models or the texts do not go together, or a task cannot be asked.
        """
        scores = self._on_texts(opened, reference) if self.texts else {}
        if self.tasks:
            told = partial(likelihoods, opened.answers, longest=opened.answers.longest)
            scores |= ask(self.tasks, told, opened.tokenizer, self.shots, self.limit)
        return Scored(opened.name, opened.bits, opened.overhead, opened.reader, scores)

    def _on_texts(self, opened: Opened, reference: Opened | None) -> dict[str, Score]:
        self._check(opened, reference)
        scores: dict[str, Score] = {}
        held: dict[str, Score] = {}
        logits = opened.answers.logits(list(self.texts.values()), self.tokens)
        for name, windows in self.texts.items():
            first = not scores and reference is not None
            beside = reference.answers.logits([windows], self.tokens) if first else repeat(None)
            loss, divergence, agreement = Sample(), Sample(), Sample()
            for batch in batches(windows, self.tokens):
                found = next(logits)  # (windows, length, vocabulary)
                loss.update(window_losses(found, batch.to(found.device)).cpu())
                for row, full in zip(found, next(beside), strict=True) if first else ():
                    row, full = row[:-1], full[:-1]  # what no loss counts
                    divergence.update(divergences(full, row).mean().cpu())
                    agreement.update(agreements(full, row).mean().cpu())
            scores[name] = Score(loss.values(), exponential=True)
            if first:
                held = {DIVERGENCE: Score(divergence.values()), AGREEMENT: Score(agreement.values())}
        return scores | held

    def _check(self, opened: Opened, reference: Opened | None) -> None:
        most, known = max(int(windows.max()) for windows in self.texts.values()), opened.answers.vocabulary
        if most >= known:
            raise RequestError(
                f"Models of one table share a tokenizer, got token {most} for {opened.name!r}, which knows {known}: "
                "score it alone."
            )
        if reference is not None and reference.answers.vocabulary != known:
            raise RequestError(
                f"A reference predicts the same tokens, got {reference.answers.vocabulary} of {reference.name!r} for "
                f"{known} of {opened.name!r}: name the model that was quantized."
            )
