"""Scores of several models side by side, on screen and as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aq_lightning.evaluation.sample import Score, known


@dataclass(frozen=True)
class Scored:
    """All scores of one model."""

    model: str
    """What it is."""
    bits: float
    """Effective bits per weight of the linears in its blocks; NaN: not known."""
    overhead: float
    """Multiply–adds per token of online products, in percent of those of the linears in the blocks."""
    reader: str
    """Who loaded it."""
    scores: Mapping[str, Score]
    """By name: of a text its perplexity."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``perplexity`` is that on the first text."""
        perplexity = next((score.value for score in self.scores.values() if score.exponential), None)
        return {
            "model": self.model,
            "bits": known(self.bits),
            "overhead": self.overhead,
            "reader": self.reader,
            **({} if perplexity is None else {"perplexity": perplexity}),
            "scores": {name: score.as_dict() for name, score in self.scores.items()},
        }


def differences(models: Sequence[Scored]) -> list[dict[str, Any]]:
    """Each model's scores less the first's over the same units, with the errors of these differences, for JSON."""
    first, *others = models
    found = []
    for other in others:
        scores = {}
        for name in other.scores.keys() & first.scores.keys():
            difference, error = other.scores[name].beyond(first.scores[name])
            scores[name] = {"value": known(difference), "error": known(error)}
        found.append({"model": other.model, "beyond": first.model, "scores": scores})
    return found


def render_scores(models: Sequence[Scored]) -> str:
    """An aligned table, one line per model, a column per score; below it, if there are several, their differences from
    the first."""
    names = list(dict.fromkeys(name for model in models for name in model.scores))
    heads = ["bits/weight", *(["multiply–adds"] if any(model.overhead for model in models) else []), *names]
    lines = [["model", *heads]]
    for model in models:
        costs = ["?" if math.isnan(model.bits) else f"{model.bits:.3f}"]
        costs += [f"+{model.overhead:.2f} %"] if "multiply–adds" in heads else []
        shown = [_shown(model.scores[name]) if name in model.scores else "" for name in names]
        lines.append([model.model, *costs, *shown])
    text = _aligned(lines)
    if len(models) > 1:
        lines = [[f"less {models[0].model}", *names]]
        for each in differences(models):
            row = [each["scores"].get(name) for name in names]
            cells = ["" if one is None else _difference(one["value"], one["error"], models[0].scores[name])
                     for name, one in zip(names, row, strict=True)]  # fmt: skip
            lines.append([each["model"], *cells])
        text += "\n\n" + _aligned(lines)
    return (
        text + "\n(± standard error" + ("; of differences: over the same units, in pairs)" if len(models) > 1 else ")")
    )


def _shown(score: Score) -> str:
    digits = _digits(score)
    error = "" if math.isnan(score.error) else f" ± {format(score.error, digits)}"
    return f"{format(score.value, digits)}{error}"


def _difference(value: float | None, error: float | None, like: Score) -> str:
    digits = _digits(like)
    shown = "?" if value is None else format(value, f"+{digits}")
    return shown if error is None else f"{shown} ± {format(error, digits)}"


def _digits(score: Score) -> str:
    """Perplexities to 2 places, shares and divergences to 4."""
    if not score.exponential:
        return ".4f"
    return ".2f" if score.value < 1e4 else ".2e"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells flush right, but for the first column."""
    first, *others = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))]
        ).rstrip()
        for name, *cells in lines
    )
