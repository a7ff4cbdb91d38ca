"""Perplexity of any causal language model on windows of tokens."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from aq_lightning.evaluation.sample import Sample, Score


def window_losses(logits: Tensor, windows: Tensor) -> Tensor:
    """Mean loss of each window's last n − 1 tokens, predicted from those before, in float32 nats.

    Args:
        logits: (windows, n, vocabulary).
        windows: int64 (windows, n).

    Returns:
        (windows,).
    """
    pairs = zip(logits, windows, strict=True)  # one window at a time bounds the float32 copy
    return torch.stack([functional.cross_entropy(row[:-1].float(), tokens[1:]) for row, tokens in pairs])


class PerplexityTest(LightningModule):
    r"""The papers' protocol: :math:`\exp` of the mean token loss over non-overlapping windows.

    Each window of n tokens predicts its last n − 1 from those before; the loss is computed in float32. Logs
    ``perplexity`` and ``loss`` (nats per token).

    Args:
        model: HF causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = Sample(sync_on_compute=False)  # one process has all windows

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        logits = self.model(input_ids=batch, use_cache=False).logits  # (batch, length, vocabulary)
        self.loss.update(window_losses(logits, batch))

    def on_test_epoch_end(self) -> None:
        self.log_dict({"loss": self.loss.compute(), "perplexity": self.score.value})

    @property
    def score(self) -> Score:
        """Perplexity on all windows so far, with its standard error."""
        return Score(self.loss.values(), exponential=True)
