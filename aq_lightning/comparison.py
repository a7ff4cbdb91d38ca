"""The models of the final table: full precision, round-to-nearest, and what calibration made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from aq_lightning.calibration import attach, capture, merge
from aq_lightning.calibration.attach import weights
from aq_lightning.calibration.call import Arguments
from aq_lightning.calibration.streams import hidden_states, run, to_device
from aq_lightning.evaluation import (
    PerplexityTest,
    Reference,
    Row,
    effective_bits,
    fits,
    overhead,
    reference_bits,
    replaced,
)
from aq_lightning.export.compressed_tensors import read
from aq_lightning.export.loading import open_model, open_parts
from aq_lightning.kernels.products import fast_products
from aq_lightning.models.ahead import read_ahead
from aq_lightning.models.loading import Pretrained
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import MinMax, quantized
from aq_lightning.recipe import StreamStorage
from aq_lightning.scheme import Grid, Scheme


class Comparison:
    """Scores models on the same windows, in float32.

    A model whose architecture is known is scored block by block: all windows pass through one block before the next is
    read. Its answers are those of the whole model.

    Args:
        loader: evaluation windows in order.
        trainer: makes a Trainer for one test, with the changes given.
        place: where the activations that enter a block are kept.
    """

    def __init__(
        self, loader: DataLoader, trainer: Callable[..., Trainer], place: Literal["host", "device"] = "device"
    ) -> None:
        self.loader = loader
        self.trainer = trainer
        self.storage = StreamStorage("float32", place)

    def baselines(self, pretrained: Pretrained, scheme: Scheme) -> list[Row]:
        """Full precision and round-to-nearest of a model, each block read once for both."""
        storage, shell = pretrained.storage, pretrained.shell()
        scheme = replace(scheme, static_cache=False)  # which nothing has been calibrated for
        full, arguments = capture(shell, self._windows, self.storage, self._device)
        nearest = full
        for index, block in enumerate(read_ahead(pretrained.block, range(len(pretrained.blocks)))):
            full = self._pass(deepcopy(block), arguments[index], full)
            merge(attach(block, pretrained.architecture, pretrained.heads, {}, MinMax, scheme, storage), storage)
            with quantized([block], scheme):
                nearest = self._pass(block, arguments[index], nearest)
        bits = nearest_bits(pretrained.blocks, scheme.weight, storage)
        return [
            Row("full precision", self._score(shell, full), torch.finfo(storage).bits),
            Row("round to nearest", self._score(shell, nearest), bits),
        ]

    def references(self, pretrained: Pretrained, kinds: Iterable[Reference]) -> list[Row]:
        """A model in the formats of bitsandbytes."""
        rows = []
        for kind in kinds:
            shell, linears = pretrained.shell(), [m for m in pretrained.blocks.modules() if isinstance(m, nn.Linear)]
            stream, arguments = capture(shell, self._windows, self.storage, self._device)
            for index, block in enumerate(read_ahead(pretrained.block, range(len(pretrained.blocks)))):
                with replaced([block], kind, self._device):
                    stream = self._pass(block, arguments[index], stream)
            rows.append(Row(f"bitsandbytes {kind}", self._score(shell, stream), reference_bits(linears, kind)))
        return rows

    def checkpoint(self, pretrained: str, name: str, trust_remote_code: bool = False) -> Row:
        """Any model by its directory or id, quantized or not, read from its files."""
        opened = open_parts(pretrained, trust_remote_code)
        if opened is None:
            whole, _, _ = open_model(pretrained, trust_remote_code=trust_remote_code)
            return Row(name, self._perplexity(whole), torch.finfo(whole.dtype).bits)
        model, scheme = opened
        shell = model.shell()
        stream, arguments = capture(shell, self._windows, self.storage, self._device)
        for index, block in enumerate(read_ahead(model.block, range(len(model.blocks)))):
            with quantized([block], scheme):
                stream = self._pass(block, arguments[index], stream)
        perplexity = self._score(shell, stream)
        if scheme is None:
            return Row(name, perplexity, torch.finfo(model.storage).bits)
        bits = effective_bits(read(Path(pretrained).expanduser())[1])
        return Row(name, perplexity, bits, overhead(model.blocks).percent)

    @cached_property
    def _windows(self) -> Tensor:
        """int64 (windows, length)."""
        return torch.cat(list(self.loader))

    @cached_property
    def _device(self) -> torch.device:
        return self.trainer(precision="32-true").strategy.root_device

    def _pass(self, block: nn.Module, arguments: Arguments, stream: Tensor) -> Tensor:
        """A block's answer to a stream, (windows, length, hidden) → a new one."""
        block = block.to(self._device, torch.float32)
        return run([block], [to_device(arguments, self._device)], stream, self.loader.batch_size, self._device)

    def _score(self, shell: PreTrainedModel, stream: Tensor) -> float:
        """Perplexity of the model whose last block answers ``stream``."""
        with hidden_states(shell, stream):
            return self._perplexity(shell)

    def _perplexity(self, model: PreTrainedModel) -> float:
        """Perplexity on the Trainer's device, in float32 unless free memory is too small: then as stored."""
        trainer = self.trainer(precision="32-true")
        if fits(model, trainer.strategy.root_device):
            for parameter in model.parameters():  # alone: rotary tables are buffers and keep their own precision
                parameter.data = parameter.data.float()
        test = PerplexityTest(model.eval())
        with fast_products(trainer.strategy.root_device):
            trainer.test(test, self.loader, verbose=False)
        model.to("cpu")
        return test.score.value


def nearest_bits(blocks: Iterable[nn.Module], grid: Grid, storage: torch.dtype) -> float:
    """Effective bits per weight of a grid on the blocks' linears, with the biases that they have."""
    shells: dict[str, QTensor | torch.Tensor] = {}
    for index, block in enumerate(blocks):
        parameters = dict(block.named_parameters())
        for name, weight in weights(block).items():
            outputs, inputs = weight.flatten(0, -2).shape
            shells[f"{index}.{name}"] = QTensor(
                torch.empty(outputs, inputs, dtype=torch.uint8, device="meta"),
                torch.empty(outputs, grid.groups(inputs), dtype=storage, device="meta"),
                torch.empty(0, dtype=torch.uint8, device="meta"),
                grid,
            )
            bias = name.removesuffix("weight") + "bias"
            if bias in parameters:
                shells[f"{index}.{bias}"] = torch.empty(outputs, dtype=storage, device="meta")
    return effective_bits(shells)
