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
from aq_lightning.export import compressed_tensors
from aq_lightning.export.directory import gathered
from aq_lightning.models.loading import Pretrained, save_companions
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
                calibrate(job, live, position, activations, streams, target)
            packed = job.journal.weights(indices.start)
            live.install(compressed_tensors.unpack(packed, recipe.scheme.weight, recipe.layout))
            streams = Streams(full=full, quantized=live.run(streams.quantized))
        del target, full  # two streams stay between windows
        live.release()
    export(job)


def calibrate(
    job: Job, live: LiveWindow, position: Position, activations: Sequence[Ranges], streams: Streams, target: Tensor
) -> None:
    """Fits one window of blocks to its target, rounds it for good and commits it to the journal.

    Args:
        job: the work.
        live: the window's blocks.
        position: where they stand.
        activations: ranges observed at each block's sites.
        streams: what enters the window, (samples, length, hidden) each.
        target: what to answer, same shape.
    """
    began = time.monotonic()
    reset_peak_memory(job.device)
    scratch, inputs = job.journal.scratch(position.index), streams.quantized
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
    codes, rounder_loss = live.round(result.module.blocks, streams, target, result.losses[result.outcome])
    merged = live.merge(result.module.blocks, codes)
    metrics = {
        "block": position.index,
        "outcome": result.outcome,
        "attempts": result.attempts,
        "causes": [cause.as_dict() for cause in result.causes],
        "candidates": {outcome: loss for outcome, loss in result.losses.items() if math.isfinite(loss)},
        "rtn_loss": result.losses["nearest"],
        "initial_loss": result.losses["start"],
        **({} if rounder_loss is None else {"rounder_loss": rounder_loss}),
        "loss": live.loss(live.blocks, inputs, target),
        "condition": result.module.conditions(),
        "effective_bits": effective_bits(merged),
        "seconds": time.monotonic() - began,
        "peak_memory_bytes": peak_memory(job.device),
    }
    job.journal.commit(position.index, compressed_tensors.pack(merged, job.recipe.layout), metrics)


def export(job: Job) -> None:
    """Writes the checkpoint from the journal's windows and the model's other tensors."""
    recipe, model = job.recipe, job.pretrained
    if job.journal.checkpoint.exists():  # written at once, so whole
        return
    gained = switches(model.blocks[0], model.architecture, model.heads, recipe)
    config = {**model.config(), **dict.fromkeys(gained, True)}
    with TemporaryDirectory() as companions:
        compressed_tensors.write(
            job.journal.checkpoint,
            config,
            gathered(_tensors(job)),
            recipe.scheme,
            layout=recipe.layout,
            ignore=model.unquantized(),
            extra_files=save_companions(model, Path(companions)),
        )


def _tensors(job: Job) -> Iterator[Mapping[str, Tensor]]:
    """What lies outside the blocks, then each window's packed weights."""
    yield job.pretrained.outside()
    for indices in job.recipe.plan.windows(len(job.pretrained.blocks)):
        yield job.journal.weights(indices.start)
