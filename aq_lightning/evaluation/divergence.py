"""How far a model's predictions are from those of the model that it stands for."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.regression import kl_divergence


def divergences(reference: Tensor, logits: Tensor) -> Tensor:
    r"""Kullback–Leibler divergence :math:`\sum p (\log p - \log q)` of the predictions for every token, in nats.

    Args:
        reference: logits of the full-precision model, whose probabilities are p, (tokens, vocabulary).
        logits: those of the other, whose probabilities are q, the same shape.

    Returns:
        float32 (tokens,); never below 0 but for rounding.
    """
    p, q = (each.float().log_softmax(-1) for each in (reference, logits))
    return kl_divergence(p, q.to(p.device), log_prob=True, reduction="none")


def agreements(reference: Tensor, logits: Tensor) -> Tensor:
    """Whether both models hold the same token for the likeliest, float32 (tokens,) of 0 and 1."""
    return (reference.argmax(-1) == logits.argmax(-1).to(reference.device)).float()
