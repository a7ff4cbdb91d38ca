"""The models of the final table: full precision, round-to-nearest, and what calibration made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from aq_lightning.calibration import rounded_to_nearest
from aq_lightning.calibration.attach import weights
from aq_lightning.evaluation import (
    PerplexityTest,
    Reference,
    Row,
    effective_bits,
    overhead,
    reference_bits,
    replaced,
)
from aq_lightning.export.compressed_tensors import read
from aq_lightning.export.loading import open_model
from aq_lightning.models.loading import Pretrained
from aq_lightning.models.lookup import architecture_of
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import quantized_activations
from aq_lightning.scheme import Grid, Scheme


class Comparison:
    """Scores models on the same windows.

    Args:
        loader: evaluation windows.
        trainer: makes a Trainer for one test, with the changes given.
    """

    def __init__(self, loader: DataLoader, trainer: Callable[..., Trainer]) -> None:
        self.loader = loader
        self.trainer = trainer

    def baselines(self, pretrained: Pretrained, scheme: Scheme) -> list[Row]:
        """Full precision and round-to-nearest of a loaded model, whose parameters come back as they were."""
        full = Row("full precision", self._perplexity(pretrained.model), torch.finfo(pretrained.storage).bits)
        blocks, storage = list(pretrained.blocks), pretrained.storage
        with (
            rounded_to_nearest(blocks, pretrained.architecture, pretrained.heads, scheme, storage),
            quantized_activations(blocks, scheme.activation),
        ):
            nearest = self._perplexity(pretrained.model)
        return [full, Row("round to nearest", nearest, nearest_bits(blocks, scheme.weight, storage))]

    def references(self, pretrained: Pretrained, kinds: Iterable[Reference]) -> list[Row]:
        """A loaded model in the formats of bitsandbytes; its linears come back as they were."""
        device, blocks, rows = self.trainer().strategy.root_device, list(pretrained.blocks), []
        for kind in kinds:
            linears = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
            bits = reference_bits(linears, kind)
            with replaced(blocks, kind, device):
                rows.append(Row(f"bitsandbytes {kind}", self._perplexity(pretrained.model), bits))
        return rows

    def checkpoint(self, pretrained: str, name: str, trust_remote_code: bool = False) -> Row:
        """Any model by its directory or id, quantized or not, read from its files."""
        model, _, scheme = open_model(pretrained, trust_remote_code=trust_remote_code)
        if scheme is None:
            return Row(name, self._perplexity(model), torch.finfo(model.dtype).bits)
        blocks = model.get_submodule(architecture_of(model.config).blocks)
        with quantized_activations(blocks, scheme.activation):
            bits = effective_bits(read(Path(pretrained).expanduser())[1])
            return Row(name, self._perplexity(model), bits, overhead(blocks).percent)

    def _perplexity(self, model: nn.Module) -> float:
        """Perplexity on the Trainer's device, in float32 unless a GPU's free memory is too small: then as stored."""
        trainer = self.trainer(precision="32-true")
        stored = model.dtype
        if _fits(model, trainer.strategy.root_device):
            _cast(model, torch.float32)
        (scores,) = trainer.test(PerplexityTest(model.eval()), self.loader, verbose=False)
        _cast(model.to("cpu"), stored)
        return scores["perplexity"]


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


def _fits(model: nn.Module, device: torch.device) -> bool:
    """Whether the parameters fit into the device in float32 and leave half of it for activations."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()  # what calibration held counts as free
    free, _ = torch.cuda.mem_get_info(device)  # bytes
    return 4 * sum(parameter.numel() for parameter in model.parameters()) <= free / 2


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Converts the parameters alone: rotary tables are buffers and keep their own precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
