"""What `test` scores: models, texts, tasks and a reference, as they are named on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aq_lightning.data import TokenWindows, protocol_windows
from aq_lightning.errors import RequestError
from aq_lightning.evaluation import Scored, check_tasks, differences
from aq_lightning.scoring import Assessment, Loader, Opened, Opening

NO_TEXT = "none"


@dataclass(frozen=True)
class Scorecard:
    """The options of `test` beside those of a model and its text."""

    perplexity: tuple[str, ...] = ()
    """Texts: names of the papers' protocols, or files; none: the evaluation text of ``data:``."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval's, or NAME=FILE."""
    shots: int | None = None
    """Examples before each question."""
    questions: int | None = None
    """Of each task."""
    reference: str | None = None
    """Directory or id of the full-precision model to be held against."""
    compare: tuple[str, ...] = ()
    """Models that are scored instead of the one of ``model:``."""
    loader: Loader = "auto"
    """Who reads quantized checkpoints."""

    def __post_init__(self) -> None:
        for name in ("shots", "questions"):
            number, least = getattr(self, name), 0 if name == "shots" else 1
            if number is not None and number < least:
                raise RequestError(f"--{name} is a whole number from {least}, got {number}: raise it.")
        if NO_TEXT in self.perplexity and (len(self.perplexity) > 1 or self.reference or not self.tasks):
            raise RequestError(
                f"--perplexity {NO_TEXT} stands alone and leaves tasks to be scored, without a reference, got "
                f"{', '.join(self.perplexity)}: name texts, or tasks."
            )
        if len(set(self.compare)) < len(self.compare):
            raise RequestError(f"--compare names each model once, got {', '.join(self.compare)}: leave one out.")

    @staticmethod
    def add_to(parser: ArgumentParser) -> None:
        """The options, as a command line takes them."""
        several: dict[str, Any] = {"nargs": "+", "type": str, "default": []}
        parser.add_argument(
            "--perplexity",
            **several,
            help="texts: wikitext2, ptb-old, ptb-new, c4-old, c4-new as papers cut them, python, files, or none; "
            "unless given, the evaluation text of --data",
        )
        parser.add_argument("--tasks", **several, help="tasks of lm-eval by name, or NAME=FILE of JSON lines")
        parser.add_argument("--shots", type=int | None, default=None, help="examples before each question")
        parser.add_argument("--questions", type=int | None, default=None, help="of each task; all unless given")
        parser.add_argument("--reference", type=str | None, default=None, help="the model in full precision")
        parser.add_argument("--compare", **several, help="models to score side by side, instead of --model.pretrained")
        parser.add_argument("--loader", type=Loader, default="auto", help="who reads quantized checkpoints")

    @classmethod
    def of(cls, section: Namespace) -> Scorecard:
        """From the parsed options.

        Raises:
            RequestError: they contradict each other.
        """
        given = {field.name: section[field.name] for field in fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def score(self, pretrained: str, opening: Opening, data: TokenWindows) -> Iterator[Scored]:
        """Scores one model after the other on the same windows and questions.

        Args:
            pretrained: the model, unless several are compared.
            opening: how models are opened.
            data: the text that is meant unless others are named, and the length and number of windows.

        Raises:
            RequestError: a model, text or task cannot be had, or the models have different tokenizers.
        """
        tasks = check_tasks(self.tasks) if self.tasks else ()
        reference, shared = None, {}
        for name in self.compare or (pretrained,):
            opened = opening.open(name)
            texts = self._texts(opened.tokenizer, data)
            check_shared(shared or texts, texts, opened)
            shared = texts
            reference = reference or (opening.open(self.reference) if self.reference else None)
            asked = Assessment(texts, tasks, self.shots, self.questions, data.evaluation_tokens)
            yield asked.of(opened, reference)
            del opened  # before the next takes its place

    def _texts(self, tokenizer: PreTrainedTokenizerBase, data: TokenWindows) -> dict[str, Tensor]:
        """Windows by the name of their text."""
        if self.perplexity == (NO_TEXT,):
            return {}
        if not self.perplexity:
            data.attach_tokenizer(tokenizer)
            return {Path(data.evaluation_source).name: data.evaluation()}
        return {
            Path(name).name: protocol_windows(name, tokenizer, data.evaluation_length, data.evaluation_samples)
            for name in self.perplexity
        }


def check_shared(texts: Mapping[str, Tensor], others: Mapping[str, Tensor], opened: Opened) -> None:
    """
    Raises:
        RequestError: perplexities would not be of the same tokens.
    """
    if not all(torch.equal(texts[name], others[name]) for name in texts):
        raise RequestError(
            f"Perplexities compare where the tokens are the same, got another tokenizer in {opened.name!r}: score it "
            "alone."
        )


def as_data(table: list[Scored]) -> dict[str, Any]:
    """For JSON: a row for each model, and the differences from the first."""
    return {"rows": [scored.as_dict() for scored in table], "differences": differences(table)}
