"""What the command line asks of a model, and how the answers are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aq_lightning.deploy.decoding import Sampling, Way
from aq_lightning.deploy.generation import Generator, Limits
from aq_lightning.deploy.loading import load
from aq_lightning.errors import RequestError

_MANY = 4096
"""Tokens for which it pays to compile steps."""


@dataclass(frozen=True)
class Prompts:
    """Prompts, and how they are answered."""

    prompt: str | None = None
    """A text to answer, token by token as they come."""
    prompts: str | None = None
    """File with a prompt a line, answered in batches; answers are printed as lines of JSON, in order."""
    chat: bool = False
    """Whether prompts are put as a user's words, through the model's chat template."""
    max_new_tokens: int = 128
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """Of the draws; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Least probability of the set of likeliest tokens from which one is drawn."""
    batch: int = 8
    """Prompts of a file that are answered side by side."""
    way: Way | None = None
    """How steps run: ``plain``, ``recorded`` as a CUDA graph, or ``compiled`` before that; null: on a GPU compiled from
    4096 tokens on, where that pays, and otherwise recorded."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise RequestError(f"A batch has 1 prompt or more, got --batch {self.batch}: try 8.")
        Limits(
            self.max_new_tokens, Sampling(self.temperature, self.top_p)
        )  # refuses what is impossible, before loading

    @property
    def limits(self) -> Limits:
        """Of every answer; the seed is the command's own."""
        return Limits(self.max_new_tokens, Sampling(self.temperature, self.top_p))

    def read(self) -> list[str]:
        """The prompts.

        Raises:
            RequestError: neither a prompt nor a file, both, or a file that cannot be read or says nothing.
        """
        if (self.prompt is None) == (self.prompts is None):
            raise RequestError('predict needs one of two: add --prompt "…" or --prompts FILE.')
        if self.prompts is None:
            return [str(self.prompt)]
        try:
            lines = Path(self.prompts).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"--prompts names a readable file of UTF-8 text, got {self.prompts!r}: {error}"
            ) from error
        found = [line for line in lines if line.strip()]
        if not found:
            raise RequestError(f"A file of prompts has one a line, got none in {self.prompts!r}: write some.")
        return found

    def answers(self, pretrained: str, device: torch.device, trust_remote_code: bool = False) -> Iterator[str]:
        """What is printed, piece by piece.

        Args:
            pretrained: the model, as :func:`~aq_lightning.deploy.loading.load` takes it.
            device: where it shall run.
            trust_remote_code: whether code from the hub may run.
        """
        texts = self.read()  # before any model is loaded
        asked = [self._asked(text) for text in texts]
        many = len(texts) * self.max_new_tokens >= _MANY
        way = self.way or ("plain" if device.type != "cuda" else "compiled" if many else "recorded")
        generator = Generator(*load(pretrained, device, trust_remote_code), way)
        if self.prompts is None:
            for (piece,) in generator.stream(asked, self.limits):
                yield piece.text if piece else ""
            yield "\n"
            return
        for start in range(0, len(asked), self.batch):
            part = slice(start, start + self.batch)
            for prompt, answer in zip(texts[part], generator.generate(asked[part], self.limits), strict=True):
                yield json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n"

    def _asked(self, text: str) -> str | list[dict[str, Any]]:
        return [{"role": "user", "content": text}] if self.chat else text
