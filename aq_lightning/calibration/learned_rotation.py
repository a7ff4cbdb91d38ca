"""Rotations learnt on the loss of the whole model, whose activations, keys and values are rounded and whose weights
are not (SpinQuant, arXiv 2405.16406)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from aq_lightning.calibration.attach import AttachedBlock, attach
from aq_lightning.calibration.call import Arguments, answer
from aq_lightning.calibration.rotated import in_basis, value_site
from aq_lightning.calibration.streams import hidden_states, run, to_device
from aq_lightning.models.pretrained import Pretrained
from aq_lightning.optimizers import CayleySGD
from aq_lightning.recipe import Recipe
from aq_lightning.transforms import LearnedRotation


@dataclass(frozen=True)
class Text:
    """Windows of text, and what stands before the first block and behind the last."""

    windows: Tensor
    """Tokens, int64 (samples, length)."""
    stream: Tensor
    """What enters block 0, (samples, length, hidden)."""
    arguments: Sequence[Arguments]
    """Other arguments of every block."""
    answers: Tensor | None
    """What the last block in full precision answers, like ``stream``; None: the text itself is to be predicted."""


class RotationFit(LightningModule):
    r"""A model in the basis Q, and in each block i values in the basis :math:`R_i`, of which only these are trained.

    .. math:: h_0 = e Q, \qquad h_{i+1} = f_i(h_i;\, \hat W_i(Q, R_i)), \qquad \text{logits} = \mathrm{head}(h_n Q^T)

    with :math:`\hat W_i` the block's weights folded into the basis (:func:`in_basis`) behind the recipe's transforms as
    they start, such as online Hadamard products. Blocks are computed again for the backward pass, one at a time. The
    blocks' hooks round activations, keys and values (:func:`aq_lightning.quantizers.quantized`).

    Args:
        pretrained: the model; its blocks are read once more.
        shell: its parts outside the blocks.
        text: what is read; batches are indices of its windows.
        recipe: with a rotation that is to be learnt, transforms and scheme.
    """

    def __init__(self, pretrained: Pretrained, shell: PreTrainedModel, text: Text, recipe: Recipe) -> None:
        super().__init__()
        self.architecture, self.heads = pretrained.architecture, pretrained.heads
        self.shell, self.text, self.training_plan = shell.requires_grad_(False), text, recipe.rotation.training
        blocks = [self._attach(pretrained.block(index), recipe) for index in range(len(pretrained.blocks))]
        self.blocks = nn.ModuleList(blocks).requires_grad_(False).eval()
        width, size = text.stream.shape[-1], self.heads.size
        turning = len(blocks) if value_site(self.architecture) is not None else 0
        self.stream = nn.Parameter(recipe.rotation(torch.eye(width)))  # float64 (width, width)
        self.values = nn.Parameter(recipe.rotation.of_heads(turning, size))  # float64 (blocks, size, size)
        self.loss = MeanMetric(nan_strategy="disable")

    def learned(self) -> LearnedRotation:
        """The matrices as they are now, on the host."""
        return LearnedRotation(self.stream.detach().cpu().clone(), self.values.detach().cpu().clone())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss of some windows, whose indices are int64 (batch)."""
        return self._losses(batch).mean()

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Adds to the mean over all windows."""
        self.loss.update(self._losses(batch))

    def configure_optimizers(self) -> object:
        optimizer = CayleySGD([self.stream, self.values], lr=self.training_plan.rate)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.training_plan.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _losses(self, indices: Tensor) -> Tensor:
        """Of windows one by one, (batch)."""
        hidden = self._last(self.text.stream[indices.to(self.text.stream.device)].to(self.device, torch.float32))
        losses = [checkpoint(self._window, *each, use_reentrant=False) for each in zip(hidden, indices, strict=True)]
        return torch.stack(losses)

    def _last(self, hidden: Tensor) -> Tensor:
        """What the last block answers in the model's own basis, (batch, length, hidden) → the same."""
        with torch.autocast(self.device.type, enabled=False):
            stream = self.stream.to(hidden.dtype)
            hidden = hidden @ stream
        for index in range(len(self.blocks)):
            hidden = checkpoint(self._block, index, hidden, stream, use_reentrant=False)
        with torch.autocast(self.device.type, enabled=False):
            return hidden.to(stream.dtype) @ stream.mT

    def _block(self, index: int, hidden: Tensor, stream: Tensor) -> Tensor:
        block: AttachedBlock = self.blocks[index]
        with torch.autocast(self.device.type, enabled=False):
            tensors = {name: tensor.to(stream.dtype) for name, tensor in block.block.named_parameters()}
            values = self.values[index].to(stream.dtype) if len(self.values) else None
            turned = in_basis(tensors, self.architecture, self.heads, lambda x: x @ stream, values)
        turned = {f"block.{name}": tensor for name, tensor in turned.items()}
        others = to_device(self.text.arguments[index], self.device)
        return answer(lambda x, **named: functional_call(block, turned, (x,), named), hidden, others)

    def _window(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Mean loss over one window, (length, hidden)."""
        given = self._logits(hidden, index)
        if self.text.answers is None:
            return functional.cross_entropy(given[:-1], self.text.windows[int(index), 1:].to(given.device))
        with torch.no_grad():
            wanted = self._logits(self.text.answers[int(index)].to(hidden), index)
        p, q = wanted.log_softmax(-1), given.log_softmax(-1)
        return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()

    def _logits(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Of a model whose last block answers (length, hidden): float32 (length, vocabulary)."""
        window = self.text.windows[int(index)][None].to(self.device)
        with hidden_states(self.shell, hidden[None]):
            return self.shell(input_ids=window, use_cache=False).logits[0].float()

    def _attach(self, block: nn.Module, recipe: Recipe) -> AttachedBlock:
        storage = next(block.parameters()).dtype
        return attach(block, self.architecture, self.heads, recipe.transforms, None, recipe.scheme, storage)


def full_answers(pretrained: Pretrained, text: Text, batch_size: int, device: torch.device) -> Tensor:
    """What the last block of the full-precision model answers, (samples, length, hidden)."""
    stream = text.stream
    for index in range(len(pretrained.blocks)):
        block = pretrained.block(index).to(device, torch.float32)
        stream = run([block], [to_device(text.arguments[index], device)], stream, batch_size, device)
    return stream
