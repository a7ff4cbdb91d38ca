"""The algorithm: calibrate a model window by window of blocks, and write what the blocks become."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from aq_lightning.calibration import (
    LiveWindow,
    Position,
    Ranges,
    RunDirectory,
    Streams,
    capture,
    fit,
    observed,
    pairs,
    peak_memory,
    reset_peak_memory,
    save_trained,
    switches,
)
from aq_lightning.evaluation import effective_bits
from aq_lightning.export import compressed_tensors, formats, parity
from aq_lightning.export.base import Subject
from aq_lightning.export.directory import gathered, verified
from aq_lightning.models.loading import Pretrained, save_companions
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import quantized_activations
from aq_lightning.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """What to calibrate, how, and where it goes."""

    pretrained: Pretrained
    """The model, on the CPU; its blocks are used up."""
    recipe: Recipe
    """The method."""
    journal: RunDirectory
    """Where finished windows go; those it already holds are taken from it."""
    trainer: Callable[[Path], Trainer]
    """A fresh Trainer for one window, rooted in the directory given (a Trainer fits only once)."""
    device: torch.device
    """Where blocks are worked on."""
    seed: int
    """Of the order in which samples are visited."""


def quantize(job: Job, windows: Tensor) -> None:
    """AffineQuant, or whichever relative the recipe describes, on every block in turn.

    Args:
        job: the work.
        windows: calibration tokens, int64 (samples, length).
    """
    recipe, model = job.recipe, job.pretrained
    stream, arguments = capture(model.model, model.blocks, windows, recipe.streams, job.device)
    streams = Streams(full=stream, quantized=stream)  # each (samples, length, hidden): inputs of block 0
    plan = list(recipe.plan.windows(len(model.blocks)))
    for number, indices in enumerate(plan):
        position = Position(indices.start, number, len(plan))
        live = LiveWindow(model, indices, arguments, recipe, job.device)
        with observed(live.blocks, model.architecture.sites) as activations:
            full = live.run(streams.full)  # what the full-precision model answers
        target = recipe.objective.target(full, live.run(streams.quantized) if recipe.objective.same_input else None)
        with quantized_activations(live.blocks, recipe.scheme.activation):
            if not job.journal.finished(indices.start):
                calibrate(job, live, position, activations, streams.quantized, target)
            packed = job.journal.weights(indices.start)
            live.install(compressed_tensors.unpack(packed, recipe.scheme.weight, recipe.layout))
            streams = Streams(full=full, quantized=live.run(streams.quantized))
        del target, full  # two streams stay between windows
        live.release()
    export(job)


def calibrate(
    job: Job, live: LiveWindow, position: Position, activations: Sequence[Ranges], inputs: Tensor, target: Tensor
) -> None:
    """Fits one window of blocks to its target, rounds it for good and commits it to the journal.

    Args:
        job: the work.
        live: the window's blocks.
        position: where they stand.
        activations: ranges observed at each block's sites.
        inputs: the quantized stream, (samples, length, hidden).
        target: what to answer, same shape.
    """
    began = time.monotonic()
    reset_peak_memory(job.device)
    scratch = job.journal.scratch(position.index)
    result = fit(
        live,
        position,
        activations,
        (inputs, target),
        trainer=lambda: job.trainer(scratch),
        loader=lambda: pairs(inputs, target, job.recipe.batch_size, job.seed + position.index),
    )
    if result.outcome != "trained":
        save_trained(result.module, scratch)
    merged = live.merge(result.module.blocks)
    metrics = {
        "block": position.index,
        "outcome": result.outcome,
        "attempts": result.attempts,
        "causes": [cause.as_dict() for cause in result.causes],
        "candidates": {outcome: loss for outcome, loss in result.losses.items() if math.isfinite(loss)},
        "rtn_loss": result.losses["nearest"],
        "initial_loss": result.losses["start"],
        "loss": live.loss(live.blocks, inputs, target),
        "condition": result.module.conditions(),
        "effective_bits": effective_bits(merged),
        "seconds": time.monotonic() - began,
        "peak_memory_bytes": peak_memory(job.device),
    }
    job.journal.commit(position.index, compressed_tensors.pack(merged, job.recipe.layout), metrics)


def export(job: Job) -> None:
    """Writes the checkpoint from the journal's windows and the model's other tensors, and checks it before it is named.

    Raises:
        ParityError: the checkpoint does not say what the quantized model says.
    """
    recipe, model = job.recipe, job.pretrained
    if job.journal.checkpoint.exists():  # written at once and checked, so whole
        return
    gained = switches(model.blocks[0], model.architecture, model.heads, recipe)
    config = {**model.config(), **dict.fromkeys(gained, True)}
    form = formats.named("compressed-tensors", recipe.layout)
    with TemporaryDirectory() as companions, verified(job.journal.checkpoint) as unverified:
        files = save_companions(model, Path(companions))
        subject = Subject(config, recipe.scheme, model.storage, model.unquantized(), files)
        shards = gathered(form.pack(shard, recipe.scheme) for shard in _tensors(job))
        form.write(unverified, config, shards, recipe.scheme, ignore=subject.ignore, extra_files=files)
        parity.check(unverified, form, subject, _tensors(job)).record(unverified)


def _tensors(job: Job) -> Iterator[Mapping[str, QTensor | Tensor]]:
    """What lies outside the blocks, then each window's weights."""
    recipe = job.recipe
    yield job.pretrained.outside()
    for indices in recipe.plan.windows(len(job.pretrained.blocks)):
        packed = job.journal.weights(indices.start)
        yield compressed_tensors.unpack(packed, recipe.scheme.weight, recipe.layout)
