"""Prompts into a static key–value cache: in one pass, by a recorded one where a length comes again.

A model of several billion weights reads a few hundred tokens faster than the host launches the thousand kernels of a
pass. A CUDA graph has no host in its way, but one length: it reads prompts that are padded on the right to a multiple
of 64 tokens. Nothing is lost by that. No token attends to those behind it; pads have the position of the last token, so
that no position is new to the model; and what they leave in the cache lies behind the prompt, where every step writes
before it reads.

A length is recorded when it comes the second time, for a recording takes as long as two passes; the first time it is
padded as well, so that the same prompt is read by the same kernels. The lengths that come again first are kept, a few,
and none gives way to another: lengths that take turns would be recorded for ever. Their graphs share one memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from aq_lightning.calibration.captured import Graph

_STEP = 64  # tokens: lengths of recorded passes are multiples
_LONGEST = 4096  # tokens of a recorded pass, of all prompts: a GPU takes longer for more than the host
_KEPT = 16  # recorded passes, of some megabytes each beside the memory that they share


class _Passing(DynamicLayer):
    """Keys and values of a prompt on their way into a static cache: attention sees those of the prompt alone, not all
    places of the cache."""

    def __init__(self, static: StaticLayer) -> None:
        super().__init__()
        self._static = static

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self._static.update(key_states, value_states)
        return key_states, value_states


class Reader:
    """Fills one cache from prompts that follow each other.

    Args:
        model: on its device, in evaluation mode.
        cache: of static layers of the same length.
        batch: prompts side by side.
        recording: whether passes are recorded, for which a GPU is needed.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int, recording: bool) -> None:
        self._model, self._cache, self._recording = model, cache, recording
        self._ids = torch.zeros(batch, cache.layers[0].max_cache_len, dtype=torch.long, device=model.device)
        self._last = torch.zeros(1, dtype=torch.long, device=model.device)  # index of the prompt's last token
        self._seen: set[int] = set()
        self._passes: dict[int, Graph] = {}

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Fills the cache; logits (batch, vocabulary) of the token behind each prompt, until the next is read.

        Args:
            ids: prompts (batch, tokens), on the model's device.
            mask: (batch, tokens), 0 where a shorter prompt is padded on the left; None: nowhere.
        """
        (batch, tokens), longest = ids.shape, self._ids.shape[1]
        width = min(-(-tokens // _STEP) * _STEP, longest)
        if mask is not None or not self._recording or batch * width > _LONGEST:
            positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
            return self._plainly(lambda: self._pass(ids, mask, positions, 1))
        self._ids[:, :tokens] = ids
        self._last.fill_(tokens - 1)
        if width in self._seen and width not in self._passes and len(self._passes) < _KEPT:
            self._record(width)
        self._seen.add(width)
        recorded = self._passes.get(width)
        return self._plainly(lambda: self._padded(width)) if recorded is None else recorded.replay()

    def _plainly(self, work: Callable[[], Tensor]) -> Tensor:
        """A pass that is not recorded; if memory runs out, recordings give theirs back."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self._passes:
                raise
            self._passes.clear()
            self._recording = False
        return work()

    def _pass(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, keep: int | Tensor) -> Tensor:
        self._cache.reset()
        cache = Cache(layers=[_Passing(layer) for layer in self._cache.layers])
        answer = self._model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=keep
        )
        return answer.logits[:, -1]

    def _padded(self, width: int) -> Tensor:
        """The work of a recorded pass."""
        ids = self._ids[:, :width]
        positions = torch.arange(width, device=ids.device).minimum(self._last).expand_as(ids)
        logits, tokens = self._pass(ids, None, positions, self._last), self._last[0] + 1
        for layer in self._cache.layers:
            layer.cumulative_length.copy_(tokens)
        return logits

    def _record(self, width: int) -> None:
        beside = next(iter(self._passes.values()), None)
        try:
            self._passes[width] = Graph(lambda: self._padded(width), warm_up=1, beside=beside)
        except RuntimeError as error:  # of memory too, of which a recorded pass needs more
            warnings.warn(f"prompts are read without recordings: {reason(error)}", stacklevel=2)
            self._recording = False


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return "".join(str(error).strip().splitlines()[:1])
