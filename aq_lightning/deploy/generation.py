"""Texts that answer texts, streamed or in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aq_lightning.deploy.decoding import Decoder, Sampling, Shape, Way
from aq_lightning.errors import RequestError

_CACHE_STEP = 256  # tokens: caches grow in steps, so that requests of similar length share recorded steps
_BOUNDLESS = 2**20  # tokens: where a model's positions have no end
_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # where a character's bytes are not all there yet


@dataclass(frozen=True)
class Limits:
    """How an answer is made."""

    max_new_tokens: int = 128
    """Tokens of an answer at most."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are chosen."""
    seed: int | None = None
    """Of the draws; None: as chance has it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"An answer has 1 token or more, got max_new_tokens {self.max_new_tokens}: try 128.")


@dataclass(frozen=True)
class Piece:
    """What a step added to one answer."""

    text: str
    """May be empty while a character is incomplete."""
    tokens: int
    """Of the answer so far, without the one that ended it."""
    ended: str | None = None
    """``stop`` for a token that ends texts, ``length`` for the limit; None: it goes on."""


class Generator:
    """Generates with one model; a recorded step is kept until another shape is asked for.

    Args:
        model: any causal language model, on its device.
        tokenizer: the model's.
        way: how steps run; None: ``compiled`` on a single GPU, ``plain`` elsewhere.
        length: tokens of prompt and answer at most, for which one step is recorded once; None: recorded anew for every
            length that is asked for, rounded up.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        way: Way | None = None,
        length: int | None = None,
    ) -> None:
        self._places = getattr(model.config, "max_position_embeddings", None) or _BOUNDLESS
        self._length = None if length is None else min(length, self._places)
        self.model, self.tokenizer = model.eval(), tokenizer
        single = len({parameter.device for parameter in model.parameters()}) == 1 and model.device.type == "cuda"
        self._way: Way = way or ("compiled" if single else "plain")
        self._decoder: Decoder | None = None
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id} - {None}

    def stream(self, prompts: Sequence[str | list[dict[str, Any]]], limits: Limits) -> Iterator[list[Piece | None]]:
        """Answers prompts side by side; for each step what it adds to each answer, None to those that have ended.

        Args:
            prompts: texts, or conversations for the model's chat template: ``[{"role": …, "content": …}, …]``.
            limits: of all answers.

        Raises:
            RequestError: an empty prompt, one that leaves no room for an answer, or a conversation for a tokenizer that
                has no template.
        """
        rows = [self.encode(prompt) for prompt in prompts]
        ids, mask = _padded(rows)
        count = min(self.room(ids.shape[1]), limits.max_new_tokens)
        if limits.seed is not None:
            torch.manual_seed(limits.seed)
        answers = [_Answer(self.tokenizer, self._ends, count) for _ in rows]
        decoder = self._decoder_of(len(rows), ids.shape[1] + count)
        for tokens in decoder.stream(ids, None if mask.all() else mask, count, limits.sampling):
            yield [answer.take(token) for answer, token in zip(answers, tokens.tolist(), strict=True)]
            if all(answer.ended for answer in answers):
                break

    def generate(self, prompts: Sequence[str | list[dict[str, Any]]], limits: Limits) -> list[str]:
        """The answers whole."""
        texts = [""] * len(prompts)
        for pieces in self.stream(prompts, limits):
            texts = [text + (piece.text if piece else "") for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Tokens of a prompt."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise RequestError("A conversation needs a tokenizer with a chat template, got one without: send a text.")
        else:
            try:
                ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
            except TemplateError as error:
                raise RequestError(f"The model's chat template refuses the conversation: {error}.") from error
        if not ids:
            raise RequestError(f"A prompt has at least one token, got none in {prompt!r}: write something.")
        return ids

    def room(self, used: int) -> int:
        """Tokens that an answer may have behind a prompt of so many.

        Raises:
            RequestError: none.
        """
        limit = self._length or self._places
        if used >= limit:
            raise RequestError(f"Prompt and answer have {limit} tokens together, got a prompt of {used}: shorten it.")
        return limit - used

    def _decoder_of(self, batch: int, needed: int) -> Decoder:
        shape = Shape(batch, self._length or -(-needed // _CACHE_STEP) * _CACHE_STEP)
        if self._decoder is None or self._decoder.shape != shape:
            self._decoder = None  # first, for its cache may be as large as the model
            torch.compiler.reset()  # which keeps code for a few shapes only
            self._decoder = Decoder(self.model, shape, self._way)
        return self._decoder


class _Answer:
    """The text of one answer, as its tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int], limit: int) -> None:
        self._tokenizer, self._ends, self._limit = tokenizer, ends, limit
        self._tokens: list[int] = []
        self._start = self._said = 0  # tokens from which text is decoded, and up to which it has been said
        self.ended = False

    def take(self, token: int) -> Piece | None:
        if self.ended:
            return None
        if token in self._ends:
            self.ended = True
            return Piece(self._text(last=True), len(self._tokens), "stop")
        self._tokens.append(token)
        self.ended = len(self._tokens) == self._limit
        return Piece(self._text(self.ended), len(self._tokens), "length" if self.ended else None)

    def _text(self, last: bool) -> str:
        """What the tokens say beyond what was said; decoded with those before, for spaces depend on them."""
        before = self._tokenizer.decode(self._tokens[self._start : self._said], skip_special_tokens=True)
        now = self._tokenizer.decode(self._tokens[self._start :], skip_special_tokens=True)
        if now.endswith(_PARTIAL) and not last:
            return ""
        self._start, self._said = self._said, len(self._tokens)
        return now[len(before) :]


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask (batch, tokens), padded on the left."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask
