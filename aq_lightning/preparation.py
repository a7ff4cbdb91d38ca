"""What is known of a run before weights are read: from the model's configuration and the recipe alone."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from aq_lightning.calibration import AttachedBlock, adapt, attach, merge
from aq_lightning.calibration.attach import weights
from aq_lightning.disk import DiskUse, disk_use
from aq_lightning.errors import RequestError
from aq_lightning.evaluation import effective_bits, overhead_lines
from aq_lightning.language_model import QuantizedLanguageModel
from aq_lightning.models.loading import Source, load_config, locate, skeleton, storage_of
from aq_lightning.models.lookup import architecture_of, heads_of
from aq_lightning.models.sites import Architecture
from aq_lightning.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A model and a recipe that suit each other."""

    source: Source
    """Where the model's files are."""
    config: PreTrainedConfig
    """Of the model."""
    architecture: Architecture
    """Of the model."""
    model: PreTrainedModel
    """The model on the meta device."""
    recipe: Recipe
    """What folds in the model, or is declared online."""
    attached: AttachedBlock
    """One of its blocks with the recipe."""
    storage: torch.dtype
    """Of the checkpoint's tensors that are not integers."""
    notes: tuple[str, ...]
    """What a user should know before the run."""

    @property
    def blocks(self) -> int:
        """Their number."""
        return len(self.model.get_submodule(self.architecture.blocks))

    def disk(self, samples: int, length: int) -> DiskUse:
        """What the run takes at most, if it keeps the streams of so many samples; of none if there are none."""
        more = 0 if self.recipe.tuning is None or not samples else self.recipe.tuning.written
        streams = (2 * samples + more) * length * self.config.get_text_config().hidden_size
        return disk_use(self.model, self.attached, self.blocks, self.recipe, streams)

    def bits(self) -> float:
        """Effective bits per weight of the result."""
        shared = {id(self.architecture): self.architecture}
        return effective_bits(merge(deepcopy(self.attached, shared), self.storage))

    def tuning_memory(self, length: int, windows: int = 1) -> int:
        """Bytes that tuning the scales of all blocks takes at most beside streams, with so many windows at once.

        All codes and the state of the optimizer stay; of a block's weights, in float32, their copies and gradients, and
        of a window's logits there is one at a time.
        """
        text, block = self.config.get_text_config(), self.attached.block
        numbers, vectors = (sum(p.numel() for p in block.parameters() if (p.ndim == 1) == vector) for vector in (0, 1))
        grid = self.recipe.scheme.weight
        groups = sum(weight.numel() // (grid.group_size or weight.shape[-1]) for weight in weights(block).values())
        outside = sum(p.numel() for p in self.model.parameters()) - self.blocks * (numbers + vectors)
        learnt = groups + vectors + (numbers if self.recipe.tuning.codes else 0)
        kept = self.blocks * (numbers + 3 * groups + 16 * learnt) + 4 * max(outside, 0)
        seen = 4 * windows * length * text.hidden_size * (self.blocks + 40)  # what enters blocks, and inside of one
        return kept + 20 * numbers + seen + 32 * length * text.vocab_size

    def places(self) -> list[dict[str, Any]]:
        """For each site of a block, its ends and the factors that fold there and that stay online; plain data."""
        found = []
        for site in self.architecture.sites:
            parts = self.attached.transforms[site.name].factors if site.name in self.attached.transforms else ()
            names = {online: [type(part).__name__ for part in parts if part.online == online] for online in (0, 1)}
            ends = f"{site.producer} → {', '.join(site.consumers) or site.dual}"
            found.append({"name": site.name, "ends": ends, "folds": names[0], "online": names[1]})
        return found

    def sites(self) -> Iterator[str]:
        """The same, a line for each site."""
        for place in self.places():
            names = [*place["folds"], *(f"{name} (online)" for name in place["online"])]
            yield f"{place['name']:<16} {', '.join(names) or 'nothing'}  ({place['ends']})"


def prepare(model: QuantizedLanguageModel) -> Prepared:
    """Everything that can be refused before weights are read and files are written; adapts the recipe if asked.

    Raises:
        RequestError: the model is not known, is quantized already, or cannot take the recipe.
    """
    source = locate(model.pretrained)
    config = load_config(source, model.trust_remote_code)
    if not source.gguf_file and getattr(config, "quantization_config", None) is not None:
        raise RequestError(
            f"A model to calibrate has full-precision weights, got {model.pretrained!r}, which is quantized already: "
            "name the original."
        )
    architecture = architecture_of(config)
    shell, recipe, notes = skeleton(config), model.recipe, []
    blocks = shell.get_submodule(architecture.blocks)
    block, heads = blocks[0], heads_of(config, architecture)
    if model.adapt:
        folding, refusals = adapt(block, architecture, heads, recipe.transforms, recipe.scheme)
        recipe = replace(recipe, transforms=folding)
        notes += [f"left out: {refusal}" for refusal in refusals]
    if recipe.rotation is not None:
        recipe.rotation.check(architecture, config.get_text_config().hidden_size)
        notes += _learnt(recipe)
    storage = storage_of(source, config)
    quantizer, scheme = recipe.weight_quantizer, recipe.scheme
    attached = attach(block, architecture, heads, recipe.transforms, quantizer, scheme, storage)
    _check_optimizer(recipe, attached)
    if architecture.experts and model.references:
        raise RequestError("References stand for linears alone, got a model with experts: leave out model.references.")
    if architecture.experts and not scheme.weight.symmetric:
        notes.append(f"note: transformers and vLLM read experts of symmetric schemes only, such as {scheme}sym")
    notes += overhead_lines(block, attached.carriers, len(blocks), torch.finfo(storage).bits)
    return Prepared(source, config, architecture, shell, recipe, attached, storage, tuple(notes))


def _learnt(recipe: Recipe) -> list[str]:
    training = recipe.rotation.training
    if training is None:
        return []
    return [
        f"rotations are learnt first, in {training.steps} steps of {training.batch_size} windows through all blocks, "
        "which one device holds; they fold, at no run-time cost"
    ]


def check_tuning(prepared: Prepared, length: int, device: torch.device) -> None:
    """
    Args:
        prepared: the model and the recipe.
        length: tokens of a window.
        device: where to work.

    Raises:
        RequestError: the scales of all blocks cannot be tuned together in the memory of a GPU.
    """
    if prepared.recipe.tuning is None or device.type != "cuda":
        return
    needed, there = prepared.tuning_memory(length), torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        raise RequestError(
            f"The scales of all blocks are tuned in the memory of one GPU, got {there / 1e9:.1f} GB where "
            f"{needed / 1e9:.1f} GB are needed: add --model.tuning null, or lower data.length"
            f"{', or set --model.tuning.codes 0' if prepared.recipe.tuning.codes else ''}."
        )


def _check_optimizer(recipe: Recipe, attached: AttachedBlock) -> None:
    """
    Raises:
        RequestError: the optimizer knows no float64, in which transforms are trained.
    """
    kind = type(recipe.optimizer([nn.Parameter(torch.zeros(1))]))
    wide = any(each.dtype == torch.float64 for each in attached.transforms.parameters())
    if wide and kind.__module__.startswith("bitsandbytes"):
        raise RequestError(
            f"Transforms are trained in float64, which bitsandbytes' optimizers refuse, got {kind.__name__}: set "
            "--model.optimizer aq_lightning.optimizers.SinglePrecision and "
            f"--model.optimizer.optimizer bitsandbytes.optim.{kind.__name__}."
        )
