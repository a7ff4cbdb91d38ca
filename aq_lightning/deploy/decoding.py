"""Tokens from a model as fast as its device gives them: a static key–value cache, and every step recorded once.

The prompt is read in one pass (:mod:`reading`). Each further token is the same work on the same tensors, recorded as a
CUDA graph; its token is put where the next step takes it, so that the host only reads along, one step behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from aq_lightning.calibration.captured import Graph
from aq_lightning.deploy.reading import Reader, reason
from aq_lightning.errors import RequestError

Way = Literal["plain", "recorded", "compiled"]
"""How steps run: each launched by the host; recorded once as a CUDA graph, for which a GPU is needed; or compiled and
then recorded, which joins small kernels and takes up to a minute for a large model. With either of these, prompts are
read by recorded passes too where their length comes again."""
_WARM_UP = 2  # steps before recording, in which code is compiled: no more than an answer has that records at all


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits."""

    temperature: float = 0.0
    """Of the softmax; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Least probability of the set of likeliest tokens from which one is drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise RequestError(f"A temperature is between 0 and 100, got {self.temperature}: 0 takes the likeliest.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is a probability above 0, got {self.top_p}: 1 leaves all tokens.")

    def choose(self, logits: Tensor) -> Tensor:
        """(batch, vocabulary) → (batch)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, places = probabilities.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p  # the likeliest never is
            probabilities = probabilities.masked_fill(outside.gather(-1, places.argsort(-1)), 0)
        # The least of independent exponential times, each at the rate of its probability, is the first with just that.
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


@dataclass(frozen=True)
class Shape:
    """What a recorded step is made for."""

    batch: int
    """Sequences side by side."""
    length: int
    """Tokens that the cache holds, of prompt and answer."""


class Decoder:
    """The steps of one model for one shape; prompts follow each other.

    Args:
        model: on its device, in evaluation mode.
        shape: of the batch.
        way: how steps run.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape, way: Way) -> None:
        self._model, self.shape = model, shape
        self._compiled = way == "compiled"
        device = model.device
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._cache = Cache(layers=[StaticLayer(shape.length) for _ in range(layers)])
        self._reader = Reader(model, self._cache, shape.batch, recording=way != "plain")
        self._token = torch.zeros(shape.batch, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(shape.batch, 1, dtype=torch.long, device=device)
        self._mask = torch.ones(shape.batch, shape.length, dtype=torch.long, device=device)
        self._step: Callable[[], Tensor] | None = self._logits if way == "plain" else None

    @torch.no_grad()
    def stream(self, ids: Tensor, mask: Tensor | None, count: int, sampling: Sampling) -> Iterator[Tensor]:
        """Answers token by token.

        Args:
            ids: prompts (batch, tokens).
            mask: (batch, tokens), 0 where a shorter prompt is padded on the left; None: nowhere.
            count: tokens of the answer.
            sampling: how they are chosen.

        Yields:
            int64 (batch) on the CPU.
        """
        logits = self._read(ids, mask)
        for index in range(count):
            self._token.copy_(sampling.choose(logits)[:, None])
            ready = _fetched(self._token)
            if index + 1 < count:
                self._step = self._step or self._record()
                logits = self._step()
            yield ready()

    def _read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Fills the cache from prompts; logits (batch, vocabulary) of the first token."""
        ids = ids.to(self._model.device)
        self._position.fill_(ids.shape[1])
        self._mask.fill_(1)
        if mask is not None:
            mask = mask.to(ids.device)
            self._mask[:, : ids.shape[1]] = mask
            self._position.copy_(mask.sum(-1, keepdim=True))
        return self._reader.read(ids, mask)

    def _logits(self) -> Tensor:
        """(batch, vocabulary) behind the token at hand, whose keys and values enter the cache."""
        answer = self._model(
            self._token, attention_mask=self._mask, position_ids=self._position, past_key_values=self._cache
        )
        self._position.add_(1)
        return answer.logits[:, -1]

    def _record(self) -> Callable[[], Tensor]:
        """Records a step; the cache and the token are afterwards as they were."""
        moving = [self._position, *(layer.cumulative_length for layer in self._cache.layers)]
        before = [tensor.clone() for tensor in moving]
        logits = torch.compile(self._logits, fullgraph=True, dynamic=False) if self._compiled else self._logits
        try:
            step = Graph(logits, _WARM_UP).replay
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of the compiler too
            warnings.warn(f"steps cannot be recorded, and run one by one: {reason(error)}", stacklevel=2)
            step = self._logits
        for tensor, kept in zip(moving, before, strict=True):
            tensor.copy_(kept)  # what the warm-up wrote behind it in the cache is written over
        return step


def _fetched(token: Tensor) -> Callable[[], Tensor]:
    """Begins to bring (batch, 1) to the host; what is returned waits for just that."""
    if token.device.type != "cuda":
        copy = token[:, 0].clone()
        return lambda: copy
    host = torch.empty(len(token), dtype=token.dtype, pin_memory=True)
    host.copy_(token[:, 0], non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return host

    return wait
