"""What a run would do and cost, before it begins: shapes, and some steps on a random block."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from aq_lightning.calibration import (
    BlockCalibration,
    LiveWindow,
    Pairs,
    Position,
    RunDirectory,
    Streams,
    capture,
    observed,
    peak_memory,
    reset_peak_memory,
)
from aq_lightning.experts import run_here
from aq_lightning.export import compressed_tensors
from aq_lightning.models.loading import Pretrained
from aq_lightning.preparation import Prepared
from aq_lightning.quantizers import quantized

_VOCABULARY = 64  # tokens of the random model
_STEPS = 2  # batches that the probe has
_EPOCHS = 3  # of them; the first step of all compiles and records, where steps are
_TUNED = 4  # passes that a step of tuning is worth: forward twice, and backward
_EXACT = 2  # passes: full precision, and the merged block, whose answers enter the next
_PASSES = 4  # more: of candidates


@dataclass(frozen=True)
class Measured:
    """Of one random block of the model's shape, on this machine."""

    trainings: int
    """How often a block is trained, each time from its start; 0: nothing is."""
    step: float
    """Seconds of a training step."""
    epoch: float
    """Seconds of an epoch beside its steps."""
    forward: float
    """Seconds of a pass of one batch, when others went before."""
    exact: float
    """The same of a pass that never takes float16."""
    other: float
    """Seconds for each batch of all else that reads samples: ranges and scales to start from, and the rounder."""
    rest: float
    """Seconds of what is done once: rounding for good, and writing the block."""
    keeping: float
    """Seconds of writing both streams of a batch, beside the work on the next block."""
    memory: int
    """Peak bytes of the device with two batches, on a CPU of the whole process."""


class Probe:
    """A random block of a model's shape, calibrated for some steps.

    Args:
        prepared: the model and the recipe.
        device: where blocks are worked on.
        length: tokens of a window.
        ranks: processes of the run; the probe takes the share of one of them in each batch.
    """

    def __init__(self, prepared: Prepared, device: torch.device, length: int, ranks: int = 1) -> None:
        self.prepared, self.device = prepared, device
        self.recipe = replace(prepared.recipe, batch_size=-(-prepared.recipe.batch_size // ranks))
        self.epochs = _EPOCHS
        size = self.recipe.batch_size * _STEPS
        self.windows = torch.randint(_VOCABULARY, (size, length))
        self.model = Pretrained(prepared.source, self._random_model(), None, prepared.architecture)

    def measure(self, trainer: Trainer, scratch: Path) -> Measured:
        """Training, whose later steps count, a pass, and what stands before and behind training.

        Args:
            trainer: for :attr:`epochs`.
            scratch: a directory to be made on the disk of the run.
        """
        recipe = self.recipe
        reset_peak_memory(self.device)
        stream, arguments = capture(self.model.shell(), self.windows, recipe.streams, self.device)
        live = LiveWindow(self.model, self.model.window([0]), arguments, recipe, self.device)
        with observed(live.blocks, self.prepared.architecture.sites) as activations:
            target = live.run(stream, exact=True)
        forward, exact = (self._apiece(partial(live.run, exact=exact), stream)[0] for exact in (False, True))
        with quantized(live.blocks, recipe.scheme):
            module = BlockCalibration(live.attach(activations, stream), live.arguments, recipe, Position(0, 0, 1))
            stopwatch = _Stopwatch(self._now)
            trainer.callbacks.append(stopwatch)
            if module.trainable():
                trainer.fit(module, Pairs(stream, target, recipe.batch_size, 0))
            trainings = self._trainings(module)

            def other(data: Tensor) -> None:
                for _ in range(max(1, trainings)):
                    live.attach(activations, data)
                live.attach_nearest(data)
                live.round(module.blocks, Streams(data, data), target[: len(data)], math.inf)

            other_each, rest = self._apiece(other, stream)
            merged = []
            rest += self._seconds(lambda: merged.append(live.merge(module.blocks, [{}])))
        journal, keeping = RunDirectory(scratch), 0.0

        def commit() -> None:
            journal.scratch(0)
            journal.put(0, compressed_tensors.pack(merged[0], recipe.layout))
            journal.commit(0, {})

        with suppress(OSError):  # no room: the plan says how much a run needs
            rest += self._seconds(commit)
            keeping = self._seconds(lambda: journal.write_streams(1, Streams(stream, target))) / _STEPS
        memory, step, epoch = peak_memory(self.device), stopwatch.step, stopwatch.epoch
        return Measured(trainings, step, epoch, forward, exact, other_each, rest, keeping, memory)

    def _apiece(self, work: Callable[[Tensor], object], stream: Tensor) -> tuple[float, float]:
        """Seconds of some work for each batch of a stream, and once, when it was done before."""
        work(stream)
        two = self._seconds(lambda: work(stream))
        one = self._seconds(lambda: work(stream[: len(stream) // _STEPS]))
        each = max(two - one, 0.0) / (_STEPS - 1)
        return each, max(one - each, 0.0)

    def _random_model(self) -> torch.nn.Module:
        """One block and a few tokens, in the storage dtype; the weights are those that training would start from."""
        config = type(self.prepared.config).from_dict(self.prepared.config.to_dict())
        config.num_hidden_layers, config.vocab_size, config.dtype = 1, _VOCABULARY, self.prepared.storage
        config.pad_token_id = None
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        run_here(model.config)
        return model

    def _trainings(self, module: BlockCalibration) -> int:
        """How often a window is trained, each from its start."""
        if not module.trainable():
            return 0
        return 2 if self.recipe.diagonal_guard and module.matrices() else 1

    def _seconds(self, work: Callable[[], object]) -> float:
        began = self._now()
        work()
        return self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()


class _Stopwatch(Callback):
    """Of a training, in seconds, with all that Lightning does around a step."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.starts: list[list[float]] = []
        """Of each epoch: its own beginning, then its steps'."""

    @property
    def step(self) -> float:
        """From one step's beginning to the next one's; the median without the first, which compiles and records."""
        each = [after - before for epoch in self.starts for before, after in pairwise(epoch[1:])]
        return statistics.median(each[1:] or each) if each else 0.0

    @property
    def epoch(self) -> float:
        """From one epoch's beginning to the next one's, without its steps; the last."""
        if len(self.starts) < 2:
            return 0.0
        before, after = self.starts[-2:]
        return max(after[0] - before[0] - (len(before) - 1) * self.step, 0.0)

    def on_train_epoch_start(self, *_: object) -> None:
        self.starts.append([self.now()])

    def on_train_batch_start(self, *_: object) -> None:
        self.starts[-1].append(self.now())


def plan_lines(
    prepared: Prepared, measured: Measured, shape: tuple[int, int], epochs: int, ranks: int = 1, kept: bool = True
) -> Iterator[str]:
    """The plan as text.

    Args:
        prepared: the model and the recipe.
        measured: what :class:`Probe` found.
        shape: samples and length.
        epochs: of every block.
        ranks: processes that share the samples.
        kept: whether streams are kept on the disk, which all processes write to.
    """
    recipe, (samples, length) = prepared.recipe, shape
    measured = replace(measured, keeping=ranks * measured.keeping if kept else 0.0)
    yield f"{prepared.config.model_type}: {prepared.blocks} blocks, {recipe.scheme}"
    yield from prepared.sites()
    yield from prepared.notes
    yield f"bits per weight: {prepared.bits():.3f}"
    yield str(prepared.disk(samples if kept else 0, length))
    each = f" of each of {ranks} processes" if ranks > 1 else ""
    for name, count in memory(prepared, measured, shape, ranks).items():
        yield f"{name} memory{each}: {count / 1e9:.2f} GB"
    block = block_seconds(measured, -(-samples // recipe.batch_size), epochs, recipe.objective.same_input)
    tuning = 0 if recipe.tuning is None else _TUNED * recipe.tuning.epochs + 2  # passes of all samples
    more = 0 if recipe.tuning is None else recipe.tuning.written
    passes = tuning * -(-(samples + more) // recipe.batch_size) + -(-more // recipe.batch_size)
    whole = block + passes * measured.forward  # tuning's share of a block
    yield (f"time: {block:.1f} s a block, {whole * prepared.blocks / 3600:.2f} h for all"
           f"{' and the tuning of their scales' if tuning else ''}, without scoring"
           f"{', without writing text' if more else ''}"
           f"{' and without what the processes tell one another' if ranks > 1 else ''}")  # fmt: skip


def block_seconds(measured: Measured, batches: int, epochs: int, same_input: bool) -> float:
    """Of one block: steps, passes of all samples, rounding and writing, or, if that takes longer, the streams on their
    way to the disk. Several processes have as many, smaller batches."""
    passes = batches * ((_PASSES + same_input) * measured.forward + _EXACT * measured.exact)
    training = measured.trainings * epochs * (batches * measured.step + measured.epoch)
    return max(training + passes + batches * measured.other + measured.rest, batches * measured.keeping)


def memory(prepared: Prepared, measured: Measured, shape: tuple[int, int], ranks: int = 1) -> dict[str, int]:
    """Peak bytes by device, of one process: what the probe took, and its share of all streams instead of the probe's.

    There are four at once: both that enter the block, the target, and the one that is being computed; and what enters
    the first block, if scales are tuned, which reads two. Of windows that the model writes there are three. Beside a
    GPU, the host holds the next block and, while the result is written, as much as a block in float32 takes.
    """
    samples, length = shape
    storage = prepared.recipe.streams
    more = max(-(-samples // ranks) - _STEPS * -(-prepared.recipe.batch_size // ranks), 0)
    tuning, hidden = prepared.recipe.tuning, prepared.config.get_text_config().hidden_size
    stream = more * length * hidden * storage.torch_dtype.itemsize
    streams = (4 if tuning is None else 5) * stream
    if tuning is not None:
        each = -(-tuning.written // ranks) * length * hidden * storage.torch_dtype.itemsize
        streams, stream = streams + 3 * each, stream + each
    block = sum(parameter.numel() for parameter in prepared.attached.block.parameters())
    outside = sum(parameter.numel() for parameter in prepared.model.parameters()) - prepared.blocks * block
    host = 4 * max(outside, 0) + (4 + prepared.storage.itemsize) * block
    if prepared.source.gguf_file is not None:  # dequantized whole, and copied, both in float32
        host = 8 * sum(parameter.numel() for parameter in prepared.model.parameters())
    whole = 0 if tuning is None else prepared.tuning_memory(length, -(-tuning.batch_size // ranks))
    if not torch.cuda.is_available():
        return {"host": max(measured.memory + streams, whole + 2 * stream) + host}
    own = peak_memory(torch.device("cpu"))
    on_device = storage.place == "device"
    return {
        "GPU": max(measured.memory + streams, whole + 2 * stream) if on_device else max(measured.memory, whole),
        "host": own + host + (0 if on_device else streams),
    }
