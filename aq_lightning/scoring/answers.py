"""Logits of a causal language model on windows of tokens, the model whole or block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aq_lightning.calibration import capture
from aq_lightning.calibration.streams import hidden_states, run, to_device
from aq_lightning.kernels.products import fast_products
from aq_lightning.models.ahead import read_ahead
from aq_lightning.models.loading import Pretrained
from aq_lightning.quantizers import quantized
from aq_lightning.recipe import StreamStorage
from aq_lightning.scheme import Scheme

_LONGEST = 2048  # tokens that a model reads which does not say how many (ALiBi)


class Answers(ABC):
    """A causal language model that answers windows of tokens.

    Args:
        model: itself, perhaps on the meta device.

    Attributes:
        vocabulary: tokens that it knows.
        width: numbers of a token between two blocks.
        longest: tokens that it reads at most.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.width: int = config.hidden_size
        self.longest: int = getattr(config, "max_position_embeddings", None) or _LONGEST

    @abstractmethod
    def logits(self, groups: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
        """Logits of every window in order, batch after batch (:func:`batches`).

        Args:
            groups: int64 (windows, length) each; lengths may differ between groups.
            tokens: read at a time.

        Yields:
            (windows, length, vocabulary), on the device that computed them.
        """


def batches(windows: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Windows (windows, length) in parts of up to so many tokens, and of one window at least."""
    return windows.split(max(1, tokens // windows.shape[1]))


class Whole(Answers):
    """A model that lies on the device."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__(model)
        self._model = model.eval().to(device)
        self._device = device

    @torch.no_grad()
    def logits(self, groups: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
        for windows in groups:
            for batch in batches(windows, tokens):
                yield _logits(self._model, batch.to(self._device))


class BlockByBlock(Answers):
    """A model of which one block is in memory: all windows pass through it before the next is read.

    What enters a block is kept in float32, and so blocks compute.

    Args:
        model: the model.
        scheme: of activations, keys and values; None: full precision.
        device: where blocks work.
        place: where the streams are kept.
    """

    def __init__(self, model: Pretrained, scheme: Scheme | None, device: torch.device, place: str) -> None:
        super().__init__(model.model)
        self._model = model
        self._scheme = scheme
        self._device = device
        self._storage = StreamStorage("float32", place)

    @torch.no_grad()
    def logits(self, groups: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
        model, shell, device = self._model, self._model.shell(), self._device
        captured = [capture(shell, windows, self._storage, device) for windows in groups]
        streams, arguments = [stream for stream, _ in captured], [each for _, each in captured]
        del captured
        for index, block in enumerate(read_ahead(model.block, range(len(model.blocks)))):
            block = block.to(device, torch.float32)
            with quantized([block], self._scheme):
                for group, stream in enumerate(streams):
                    others = [to_device(arguments[group][index], device)]
                    streams[group] = run([block], others, stream, max(1, tokens // stream.shape[1]), device)
        shell.to(device)
        for windows, stream in zip(groups, streams, strict=True):
            with hidden_states(shell, stream):
                for batch in batches(windows, tokens):
                    yield _logits(shell, batch.to(device))


def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Of windows (windows, length) on the model's device."""
    with fast_products(batch.device):
        return model(input_ids=batch, use_cache=False).logits
