"""One optimizer step of calibration, on blocks of random weights in the shapes of well-known models.

In one run on one GPU, 1 × 2048 tokens a step unless told otherwise:

* ``block``: the block alone in bfloat16, forward and backward with weight gradients, compiled: the floor;
* ``reference``: the published recipe, written plainly (benchmarks/reference_recipe.py);
* ``weights``, ``activations``: configs/affinequant.yaml at w4a16g128 and at w4a4, fitted by Lightning as users run it;
* ``dense``: configs/affinequant-dense.yaml, the paper's matrices behind both norms, at w4a16g128.

Steps of ours are timed from one batch to the next, everything between them included. Prints a markdown table; a method
whose loss is not finite has no time. ``--profile DIRECTORY`` writes what each step's time went to. ``--samples 128``
holds the streams of a whole calibration, ``--place host`` in pinned memory of the host, from where each batch is
uploaded ahead of its step.

    python benchmarks/calibration.py --shapes llama-7b llama-3-8b
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from reference_recipe import ReferenceStep
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from aq_lightning.calibration import BlockCalibration, LiveWindow, Pairs, Position, capture, observed
from aq_lightning.calibration.streams import to_device
from aq_lightning.language_model import QuantizedLanguageModel
from aq_lightning.models.llama import SPEC
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.quantizers import quantized_activations
from aq_lightning.recipe import Recipe
from callbacks import GradualMask

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, EPOCHS, LENGTH = 128, 20, 2048  # of a whole calibration: the paper's
WARM_UP = 8  # steps


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a model's block, and how many it has."""

    hidden: int
    intermediate: int
    heads: int
    key_value: int
    blocks: int


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 32),
    "llama-30b": Shape(6656, 17920, 52, 52, 60),
    "llama-70b": Shape(8192, 28672, 64, 8, 80),
    "smollm2": Shape(576, 1536, 9, 3, 30),
    "tiny": Shape(128, 256, 4, 2, 2),
}
DEFAULT = [name for name in SHAPES if name.startswith("llama")]
OURS = {
    "weights": ("affinequant.yaml", "w4a16g128"),
    "activations": ("affinequant.yaml", "w4a4"),
    "dense": ("affinequant-dense.yaml", "w4a16g128"),
}
METHODS = ("block", "reference", *OURS)


@dataclass(frozen=True)
class Timing:
    """One row of the table."""

    milliseconds: float
    gibibytes: float
    first_seconds: float
    """Until the first step was done: compilation, recording."""


class Bench:
    """One shape on one device.

    Args:
        shape: of the block.
        device: where.
        batch: samples in a step.
        steps: that are timed.
        profile: directory for profiles; None: none.
        samples: in the streams.
        place: of the streams, ``device`` or ``host``.
    """

    def __init__(
        self, shape: Shape, device: torch.device, batch: int, steps: int, profile: Path | None, samples: int, place: str
    ) -> None:
        self.shape, self.device, self.batch, self.steps, self.profile = shape, device, batch, steps, profile
        self.samples, self.place = samples, place

    def run(self, method: str, **changes: object) -> Timing:
        """Times one method."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if method == "block":
            return self.alone()
        if method == "reference":
            return self.reference()
        return self.ours(method, **changes)

    def alone(self) -> Timing:
        """Forward and backward of the plain block, compiled, in bfloat16."""
        model, stream, arguments = self.model(torch.bfloat16)
        block = model.blocks[0].to(self.device, torch.bfloat16).requires_grad_(True)
        others = {name: _cast(value, torch.bfloat16) for name, value in arguments.items()}
        compiled = torch.compile(lambda x: block(x, **others))
        target = torch.randn_like(stream[: self.batch])

        def step() -> float:
            output = compiled(stream[: self.batch])
            output = output[0] if isinstance(output, tuple) else output
            torch.nn.functional.mse_loss(output.float(), target.float()).backward()
            for parameter in block.parameters():
                parameter.grad = None
            return 0.0

        return self.timed(step)

    def reference(self) -> Timing:
        """The published recipe."""
        model, stream, arguments = self.model(torch.float32)
        block = model.blocks[0].to(self.device, torch.float32).requires_grad_(False)
        step = ReferenceStep(block, arguments, model.heads)
        hidden = stream[: self.batch].float()
        target = hidden + 0.01 * torch.randn_like(hidden)
        return self.timed(lambda: step(hidden, target))

    def timed(self, step: Callable[[], float]) -> Timing:
        """Median of a step after warming up."""
        began = time.monotonic()
        step()
        first, watch = time.monotonic() - began, Stopwatch(self.device)
        for _ in range(WARM_UP + self.steps):
            loss = step()
            assert math.isfinite(loss), "the loss is not finite"
            watch.lap()
        return Timing(watch.milliseconds(), self.peak(), first)

    def ours(self, method: str, **changes: object) -> Timing:
        """The fit of one block by a Trainer, as in a run."""
        recipe = replace(recipe_of(*OURS[method]), batch_size=self.batch, **changes)
        model, _, _ = self.model(torch.float32)
        storage = replace(recipe.streams, place=self.place)
        stream, arguments = capture(model.shell(), tokens(self.samples), storage, self.device)
        live = LiveWindow(model, model.window([0]), arguments, recipe, self.device)
        with observed(live.blocks, SPEC.sites) as activations:
            target = live.run(stream)
        module = BlockCalibration(live.attach(activations, stream), live.arguments, recipe, Position(0, 0, 1))
        watch, name = Stopwatch(self.device), f"{method}-{self.shape.hidden}"
        epochs = -(-(WARM_UP + self.steps) * self.batch // self.samples)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        precision = "bf16-mixed" if self.device.type == "cuda" else "32-true"
        with tempfile.TemporaryDirectory() as root, quantized_activations(live.blocks, recipe.scheme.activation):
            trainer = Trainer(
                accelerator=self.device.type, devices=1, precision=precision, max_epochs=epochs,
                callbacks=[Laps(watch, self.profile and self.profile / f"{name}.txt"), GradualMask()],
                default_root_dir=root, num_sanity_val_steps=0, **quiet,
            )  # fmt: skip
            began = time.monotonic()
            trainer.fit(module, Pairs(stream, target, self.batch, 0, device=self.device))
        assert module.cause is None, f"stopped: {module.cause}"
        return Timing(watch.milliseconds(), self.peak(), watch.first - began)

    def model(self, dtype: torch.dtype) -> tuple[Pretrained, Tensor, dict[str, object]]:
        """A model of one block with random weights, the block's inputs and its other arguments on the device."""
        torch.manual_seed(0)
        shape = self.shape
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=1,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value,
            max_position_embeddings=LENGTH,
            dtype=torch.float16,  # of the checkpoint
        )
        with self.device:
            pretrained = Pretrained(Source("random"), LlamaForCausalLM(config).eval().requires_grad_(False), None, SPEC)
        storage = replace(recipe_of("rtn.yaml", "w4a16").streams, dtype=str(dtype).removeprefix("torch."))
        stream, arguments = capture(pretrained.shell(), tokens(self.batch), storage, self.device)
        return pretrained, stream, to_device(arguments[0], self.device)

    def peak(self) -> float:
        """GiB of the GPU's memory; not a number elsewhere."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else math.nan


class Stopwatch:
    """Times between laps, without waiting for a GPU in between."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.laps: list[object] = []
        self.first = 0.0

    def lap(self) -> None:
        """A step is done."""
        if not self.laps:
            self.first = time.monotonic()
        if self.gpu:
            self.laps.append(torch.cuda.Event(enable_timing=True))
            self.laps[-1].record()
        else:
            self.laps.append(time.monotonic() * 1e3)

    def milliseconds(self) -> float:
        """Median after warming up."""
        if self.gpu:
            torch.cuda.synchronize()
        between = zip(self.laps[WARM_UP:], self.laps[WARM_UP + 1 :], strict=False)
        return statistics.median(a.elapsed_time(b) if self.gpu else b - a for a, b in between)


class Laps(Callback):
    """A lap at the end of every batch, and a profile of three late ones."""

    def __init__(self, watch: Stopwatch, profile: Path | None) -> None:
        self.watch, self.path = watch, profile
        self.profiler: torch.profiler.profile | None = None

    def on_train_batch_end(self, *_: object) -> None:
        self.watch.lap()
        done = len(self.watch.laps)
        if self.path is not None and done == WARM_UP - 4:
            self.profiler = torch.profiler.profile().__enter__()
        if self.profiler is not None and done == WARM_UP - 1:
            self.profiler.__exit__(None, None, None)
            averages, self.profiler = self.profiler.key_averages(), None
            self.path.write_text(
                averages.table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110)
            )


def recipe_of(config: str, scheme: str) -> Recipe:
    """The recipe of a configuration file, with another scheme."""
    parser = ArgumentParser()
    parser.add_class_arguments(QuantizedLanguageModel, "model")
    section = yaml.safe_load((ROOT / "configs" / config).read_text("utf-8"))["model"]
    return parser.instantiate(parser.parse_object({"model": {**section, "scheme": scheme}})).model.recipe


def tokens(samples: int) -> Tensor:
    """Random windows, int64 (samples, LENGTH)."""
    return torch.randint(256, (samples, LENGTH), generator=torch.Generator().manual_seed(0))


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_cast(each, dtype) for each in value) if isinstance(value, (tuple, list)) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=DEFAULT)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--place", choices=("device", "host"), default="device")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", message=".*steps cannot be recorded")  # such a time is another thing's
    if given.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.batch} × {LENGTH} tokens a step\n")
    print("| shape | method | ms a step | × the block | GiB | minutes for the model | s to the first step |")
    print("|---|---|---|---|---|---|---|")
    for name in given.shapes:
        device = torch.device(given.device)
        bench = Bench(
            SHAPES[name], device, given.batch, given.steps, given.profile, max(given.samples, given.batch), given.place
        )
        floor = math.nan
        for method in given.methods:
            try:
                found = bench.run(method)
            except (torch.OutOfMemoryError, AssertionError) as failure:
                print(f"| {name} | {method} | {str(failure).splitlines()[0]} | | | | |", flush=True)
                continue
            floor = found.milliseconds if method == "block" else floor
            minutes = found.milliseconds * SAMPLES * EPOCHS * SHAPES[name].blocks / given.batch / 6e4
            print(f"| {name} | {method} | {found.milliseconds:.2f} | {found.milliseconds / floor:.2f} | "
                  f"{found.gibibytes:.1f} | {minutes:.1f} | {found.first_seconds:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
