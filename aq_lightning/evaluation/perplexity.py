"""Perplexity of any causal language model on windows of tokens."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric


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
        self.loss = MeanMetric(sync_on_compute=False)  # one process has all windows

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        logits = self.model(input_ids=batch, use_cache=False).logits  # (batch, length, vocabulary)
        for row, tokens in zip(logits, batch, strict=True):  # one window at a time bounds the float32 copy
            self.loss.update(functional.cross_entropy(row[:-1].float(), tokens[1:]))

    def on_test_epoch_end(self) -> None:
        loss = self.loss.compute()
        self.log_dict({"loss": loss, "perplexity": torch.exp(loss.double())})
