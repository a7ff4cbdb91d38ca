"""Multiple-choice questions in a user's file, as tasks of lm-eval.

The fields of its first row say what a file holds; prompts are those of lm-eval's own tasks of that kind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aq_lightning.errors import RequestError


@dataclass(frozen=True)
class Kind:
    """Rows with certain fields, and how lm-eval asks them."""

    fields: tuple[str, ...]
    """A row has all of these."""
    text: str
    """What is asked; of several questions that end alike (WinoGrande), the number of the right one."""
    choices: str | list[str]
    """The answers to choose from."""
    target: str
    """Number of the right answer; of questions that end alike, their end."""
    normalized: bool = True
    """Whether lm-eval states accuracy by likelihood per byte too."""


KINDS = (
    Kind(("goal", "sol1", "sol2", "label"), "Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}", "label"),
    Kind(("query", "choices", "label"), "{{query}}", "choices", "label"),
    Kind(("question", "choices", "label"), "Question: {{question}}\nAnswer:", "choices", "label"),
    Kind(("options", "continuation", "label"), "label", "options", "continuation", normalized=False),
    Kind(
        ("passage", "question", "label"),
        "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        ["no", "yes"],
        "label",
        normalized=False,
    ),
)
"""PIQA; HellaSwag; ARC; WinoGrande; BoolQ."""


def local_task(name: str, file: Path) -> dict[str, Any]:
    """The configuration of a task of lm-eval's.

    Args:
        name: under which scores are reported.
        file: JSON lines, all of one kind.

    Raises:
        RequestError: it is no such file, or its rows are of no known kind.
    """
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise RequestError(
            f"Questions are lines of JSON in an existing file, got {str(file)!r} ({error}): mend it."
        ) from error
    fields = set.intersection(*(set(row) if isinstance(row, dict) else set() for row in rows)) if rows else set()
    kind = next((each for each in KINDS if fields >= set(each.fields)), None)
    if kind is None:
        known = "; ".join(", ".join(each.fields) for each in KINDS)
        raise RequestError(
            f"All rows of questions have the fields of one kind ({known}), got {', '.join(sorted(fields)) or 'none'} "
            f"common to those of {str(file)!r}: rename them."
        )
    for number, row in enumerate(rows):
        count = len(row[kind.choices]) if kind.choices in ("choices", "options") else 2
        if isinstance(row["label"], str) or not 0 <= row["label"] < count:
            raise RequestError(
                f"The label is the number of the right answer, from 0, got {row['label']!r} for {count} in row "
                f"{number} of {str(file)!r}: mend it."
            )
    metrics = ["acc", "acc_norm"] if kind.normalized else ["acc"]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": kind.text,
        "doc_to_choice": kind.choices,
        "doc_to_target": kind.target,
        "metric_list": [{"metric": each, "aggregation": "mean", "higher_is_better": True} for each in metrics],
    }
