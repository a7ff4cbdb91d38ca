"""The algorithm: calibrate a model window by window of blocks, and write what the blocks become."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from aq_lightning import distributed
from aq_lightning.calibration import (
    WHOLE,
    Arguments,
    Guards,
    Inside,
    Keeper,
    LiveWindow,
    Pairs,
    Position,
    Ranges,
    RunDirectory,
    Share,
    Streams,
    Weights,
    activation_reach,
    assemble,
    capture,
    fit,
    garbage_kept,
    observed,
    peak_memory,
    reset_peak_memory,
    retuned,
    save_trained,
    switches,
    tune,
    weight_reach,
)
from aq_lightning.data import check_windows
from aq_lightning.evaluation import effective_bits
from aq_lightning.export import compressed_tensors, formats, parity
from aq_lightning.export.base import Subject
from aq_lightning.export.directory import gathered, verified
from aq_lightning.models.ahead import read_ahead
from aq_lightning.models.loading import Pretrained, save_companions
from aq_lightning.quantizers import quantized
from aq_lightning.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """What to calibrate, how, and where it goes."""

    pretrained: Pretrained
    """The model; its blocks are read one window at a time."""
    recipe: Recipe
    """The method."""
    journal: RunDirectory
    """Where finished windows go; those it already holds are taken from it."""
    trainer: Callable[..., Trainer]
    """A fresh Trainer for one window, rooted in the directory given (a Trainer fits only once), and with the options
    given by name."""
    device: torch.device
    """Where blocks are worked on."""
    seed: int
    """Of the order in which samples are visited."""
    guards: Guards = field(default_factory=Guards)
    """Against losing work."""
    tell: Callable[[Position, Mapping[str, Any]], object] = lambda *_: None
    """Told of each window when it is done, with its metrics; of the whole model too, if its scales are tuned."""

    def starts(self) -> list[int]:
        """First blocks of all windows, and what stands for the whole model, if its scales are tuned."""
        windows = self.recipe.plan.windows(len(self.pretrained.blocks))
        return [indices.start for indices in windows] + [WHOLE] * (self.recipe.tuning is not None)

    def window(self, start: int) -> Weights:
        """Weights of the finished window that starts at a block, on the device."""
        return self.unpacked(self.journal.weights(start, str(self.device)))

    def unpacked(self, stored: Mapping[str, Tensor]) -> Weights:
        """Weights from what the journal keeps of them."""
        return compressed_tensors.unpack(stored, self.recipe.scheme.weight, self.recipe.layout)


def quantize(job: Job, windows: Tensor, written: Tensor | None = None) -> None:
    """AffineQuant, or whichever relative the recipe describes, on every block in turn; of several processes each passes
    its own share of the windows through every block.

    Args:
        job: the work.
        windows: calibration tokens, int64 (samples, length).
        written: tokens of windows for the last stage alone, of the same length; None: none.
    """
    check_windows(windows, job.pretrained.model.get_input_embeddings().num_embeddings)
    if not all(job.journal.finished(start) for start in job.starts()):
        with garbage_kept():
            _calibrate_all(job, windows, windows[:0] if written is None else written)
    distributed.part()
    if distributed.leads():
        export(job)


def _calibrate_all(job: Job, windows: Tensor, written: Tensor) -> None:
    """Every window of blocks that is not finished, and what follows for all of them."""
    recipe, model, starts = job.recipe, job.pretrained, job.starts()
    plan, following = list(recipe.plan.windows(len(model.blocks))), dict(pairwise(starts))
    share, both = (Share(count, recipe.batch_size, distributed.rank(), distributed.ranks())
                   for count in (len(windows), len(windows) + len(written)))  # fmt: skip
    own = both.indices()
    stream, arguments = capture(model.shell(), torch.cat([windows, written])[own], recipe.streams, job.device)
    streams = Streams.entering(stream, int((own < len(windows)).sum()))  # each (samples, length, hidden)
    entering, stream = None if recipe.tuning is None else stream, None  # which the first window uses up
    first, streams = _where_to_go_on(job, starts, streams)
    ahead = [indices for indices in plan if indices.start >= first]
    with Keeper(job.journal) as keeper:
        for indices, blocks in zip(ahead, read_ahead(model.window, ahead), strict=True):
            position = Position(indices.start, plan.index(indices), len(plan))
            live = LiveWindow(model, blocks, arguments, recipe, job.device)
            with observed(live.blocks, model.architecture.sites) as activations:
                full = live.run(streams.full, exact=True)  # what the full-precision model answers
            more = None if streams.written is None else live.run(streams.written)
            target = None if job.journal.finished(indices.start) else live.target(full, streams.quantized)
            with quantized(live.blocks, recipe.scheme):
                if target is None:
                    live.install(job.window(indices.start))
                    answers = full if recipe.inputs == "full" else live.run(streams.quantized, exact=True)
                else:
                    answers = calibrate(job, live, position, activations, streams, target, share)
            streams = Streams(full, full if recipe.inputs == "full" else answers, more)
            del full, target, answers, more  # two streams stay between windows, or three
            live.release()
            if job.guards.keep_streams and indices.start in following:
                keeper.keep(following[indices.start], streams)
        if not all(job.journal.finished(start) for start in starts):
            keeper.finish()
            data, streams = (entering, streams.all_full(recipe.streams, job.device)), None  # two are read from here on
            tune_scales(job, data, arguments, both.samples)


def _where_to_go_on(job: Job, starts: list[int], entering: Streams) -> tuple[int, Streams]:
    """The first block whose window needs work, and the streams that enter it; block 0 if they are not kept."""
    kept = job.journal.kept(starts)
    if kept is None:
        return starts[0], entering
    return kept[0], kept[1].stored(job.recipe.streams, job.device)


def calibrate(
    job: Job,
    live: LiveWindow,
    position: Position,
    activations: Sequence[Ranges],
    streams: Streams,
    target: Tensor,
    share: Share,
) -> Tensor:
    """Fits one window of blocks to its target, rounds it for good and commits it to the journal.

    Args:
        job: the work.
        live: the window's blocks.
        position: where they stand.
        activations: ranges observed at each block's sites.
        streams: what enters the window, (samples, length, hidden) each.
        target: what to answer, same shape; used up, if it is a stream of its own.
        share: which samples these are.

    Returns:
        What the blocks answer as the journal holds them.
    """
    reset_peak_memory(job.device)
    scratch, inputs = job.journal.scratch(position.index), streams.quantized
    inside = Inside(job.journal.inside, job.guards.save_every, job.guards.stopping, job.journal.at_work)
    result = fit(
        live,
        position,
        activations,
        (inputs, target),
        trainer=inside.attempts(position.index, lambda: job.trainer(scratch)),
        loader=lambda: Pairs(inputs, target, job.recipe.batch_size, job.seed + position.index, share, job.device),
    )
    if result.outcome != "trained" and distributed.leads():
        save_trained(result.module, scratch)
    codes, rounder_loss = live.round(result.module.blocks, streams, target, result.losses[result.outcome])
    metrics: dict[str, Any] = {
        "block": position.index,
        "outcome": result.outcome,
        "attempts": result.attempts,
        "causes": [cause.as_dict() for cause in result.causes],
        "candidates": {outcome: loss for outcome, loss in result.losses.items() if math.isfinite(loss)},
        "rtn_loss": result.losses["nearest"],
        "initial_loss": result.losses["start"],
        **({} if rounder_loss is None else {"rounder_loss": rounder_loss}),
        "condition": result.module.conditions(),
        "margin": result.module.margins(),
        "reach": {"weights before": weight_reach(live.blocks), "activations before": activation_reach(activations)},
        "training_seconds": result.seconds,
    }
    return _complete(job, live, position, (inputs, target), live.merge(result.module.blocks, codes), metrics)


def _complete(
    job: Job,
    live: LiveWindow,
    position: Position,
    data: tuple[Tensor, Tensor],
    merged: Weights,
    metrics: dict[str, Any],
) -> Tensor:
    """Writes a window that is rounded for good, and what it answers as the journal holds it; returns the answers."""
    job.journal.put(position.index, compressed_tensors.pack(merged, job.recipe.layout))
    live.install(job.window(position.index))  # the same in every process, and when a run goes on from here
    with observed(live.blocks, job.pretrained.architecture.sites) as activations:
        metrics["loss"], answers = live.answers(*data)
    metrics["reach"] |= {"weights after": weight_reach(live.blocks), "activations after": activation_reach(activations)}
    metrics |= {
        "effective_bits": effective_bits(merged),
        "seconds": time.monotonic() - live.began,
        "peak_memory_bytes": max(distributed.gathered(peak_memory(job.device))),
    }
    job.journal.commit(position.index, metrics)
    job.tell(position, metrics)
    return answers


def tune_scales(job: Job, data: tuple[Tensor, Tensor], arguments: Sequence[Arguments], samples: int) -> None:
    """Trains all blocks together, and commits what changed to the journal.

    Args:
        job: the work; every window is finished.
        data: what enters block 0, and what the last block answers in full precision, (samples, length, hidden) each.
        arguments: other arguments of every block.
        samples: of all processes.
    """
    began, recipe, scratch = time.monotonic(), job.recipe, job.journal.scratch(WHOLE)
    reset_peak_memory(job.device)
    options = {"max_epochs": recipe.tuning.epochs, "max_steps": -1, "callbacks": []}
    whole = assemble(job.pretrained, recipe, arguments, job.window, job.device)
    share = Share(samples, recipe.tuning.batch_size, distributed.rank(), distributed.ranks())
    inside = Inside(job.journal.inside, job.guards.save_every, job.guards.stopping, job.journal.at_work)
    with quantized([block.block for block in whole.blocks], recipe.scheme):
        result = tune(
            whole,
            job.pretrained,
            data,
            trainer=inside.attempts(WHOLE, lambda: job.trainer(scratch, **options)),
            loader=lambda: Pairs(*data, recipe.tuning.batch_size, job.seed + WHOLE, share, job.device),
        )
    metrics: dict[str, Any] = {
        "outcome": "trained" if result.tensors else "start",
        "divergence": {
            when: value if math.isfinite(value) else None
            for when, value in (("before", result.before), ("after", result.after))
        },
        "seconds": time.monotonic() - began,
        "peak_memory_bytes": max(distributed.gathered(peak_memory(job.device))),
    }
    job.journal.put(WHOLE, compressed_tensors.pack(result.tensors, recipe.layout))
    job.journal.commit(WHOLE, metrics)
    job.tell(whole.position, metrics)


def export(job: Job) -> None:
    """Writes the checkpoint from the journal's windows and the model's other tensors, and checks it before it is named.

    Raises:
        ParityError: the checkpoint does not say what the quantized model says.
    """
    recipe, model = job.recipe, job.pretrained
    if job.journal.exported():
        return
    config = model.config() | dict.fromkeys(switches(model.blocks[0], model.architecture, model.heads, recipe), True)
    limit = 4 * sum(each.numel() for each in model.blocks[0].parameters())  # bytes: what calibration took at least
    form = formats.named("compressed-tensors", recipe.layout)
    with TemporaryDirectory() as companions, verified(job.journal.checkpoint) as unverified:
        files = save_companions(model, Path(companions))
        subject = Subject(config, recipe.scheme, model.storage, model.unquantized(), files)
        shards = gathered((form.pack(shard, recipe.scheme) for shard in _tensors(job)), limit)
        form.write(unverified, config, shards, recipe.scheme, ignore=subject.ignore, extra_files=files)
        parity.check(unverified, form, subject, _tensors(job)).record(unverified)
    job.journal.seal_checkpoint()


def _tensors(job: Job) -> Iterator[Weights]:
    """What lies outside the blocks, then each window's weights."""
    changed = job.journal.weights(WHOLE) if job.recipe.tuning is not None else {}
    yield job.pretrained.outside()
    for indices in job.recipe.plan.windows(len(job.pretrained.blocks)):
        prefixes = tuple(f"{job.pretrained.architecture.blocks}.{index}." for index in indices)
        mine = {name: tensor for name, tensor in changed.items() if name.startswith(prefixes)}
        yield retuned(job.unpacked(job.journal.weights(indices.start)), job.unpacked(mine))
