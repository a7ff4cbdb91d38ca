"""Everything that decides what happens to a model, apart from which model and which text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from aq_lightning.errors import RequestError
from aq_lightning.kernels.layout import Layout
from aq_lightning.objectives import Objective
from aq_lightning.quantizers import WeightQuantizerFactory
from aq_lightning.rounders import Rounder
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import FactorFactory, Rotation

_GREATEST_RATE = 1e6  # far beyond use, and still a number in every precision

OptimizerFactory = Callable[[Iterable], Optimizer]

Decay = Literal["none", "cosine", "linear"]
"""Of step sizes to 0 over a window's steps: along half a cosine, or along a line."""


@dataclass(frozen=True)
class LearningRates:
    """Step sizes of the three kinds of parameters; see the YAML files for tuned values."""

    transform: float
    """Of all maps: affine, Kronecker, dense, diagonal, rotary and shift parameters."""
    clipping: float
    """Of the ranges of weight quantizers, and of activations."""
    rounding: float = 0.0
    """Of what learned rounding adds to each weight, in steps of its grid."""

    def __post_init__(self) -> None:
        for name, rate in vars(self).items():
            if not 0 <= rate <= _GREATEST_RATE:
                raise RequestError(
                    f"A step size lies in [0, {_GREATEST_RATE:g}], got learning_rates.{name} {rate}: try 5e-3."
                )


@dataclass(frozen=True)
class WindowPlan:
    """Which blocks are fitted together: consecutive windows of ``size`` blocks that harden together."""

    size: int = 1
    """Blocks per window."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RequestError(f"A window holds at least 1 block, got {self.size}: set plan.size to 1 or more.")

    def windows(self, blocks: int) -> Iterator[range]:
        """Index ranges that cover ``blocks`` in order; the last may be shorter."""
        for start in range(0, blocks, self.size):
            yield range(start, min(start + self.size, blocks))


@dataclass(frozen=True)
class ScaleTuning:
    """What follows once every block is rounded: scales, norms and biases of all blocks, and codes if asked for, trained
    together on what the full-precision model says (:mod:`aq_lightning.calibration.tuning`), with the recipe's
    optimizer."""

    epochs: int
    """Passes over the calibration windows."""
    scales: float
    """Step size of scales, in steps of the grid: how far it moves a code at the far end of its range. With 2 bits a
    third of it is what the scale itself changes by, with 4 a fifteenth."""
    norms: float
    """The same of norms and biases, relative to the root of their mean square."""
    codes: float = 0.0
    """The same of codes, as a share of the grid from end to end, so that one number serves 2 bits and 4: times the
    grid's steps, the share of codes with a reason to move that do so in a step; 0: they stay. Training keeps four
    numbers of 32 bits beside each."""
    batch_size: int = 4
    """Windows of text per step."""
    written: int = 0
    """Windows of text that the full-precision model writes itself, to be passed over beside those of calibration."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("written", 0)):
            if getattr(self, name) < least:
                raise RequestError(
                    f"Tuning takes at least {least}, got tuning.{name} {getattr(self, name)}: raise it, or leave "
                    "model.tuning out."
                )
        for name in ("scales", "norms", "codes"):
            if not 0 <= getattr(self, name) <= _GREATEST_RATE:
                raise RequestError(
                    f"A step size lies in [0, {_GREATEST_RATE:g}], got tuning.{name} {getattr(self, name)}: try 1e-2."
                )


@dataclass(frozen=True)
class StreamStorage:
    """How streams are kept between passes."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the cache; passes compute in the block's own."""
    place: Literal["host", "device"] = "device"
    """Whether streams lie in host memory, pinned for a GPU, or beside the block."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]

    def store(self, stream: Tensor, device: torch.device) -> Tensor:
        """A stream in its dtype and place, ``device`` being the blocks'."""
        if self.place == "device":
            return stream.to(device, self.torch_dtype)
        stored = stream.to("cpu", self.torch_dtype)
        return stored.pin_memory() if device.type == "cuda" else stored


@dataclass(frozen=True)
class Recipe:
    """One method, as data."""

    scheme: Scheme
    """Integers of weights and activations."""
    transforms: Mapping[str, Sequence[FactorFactory]]
    """Site name → factors of its transform, in the order they act on activations."""
    weight_quantizer: WeightQuantizerFactory
    """Range rule of every weight."""
    rounder: Rounder
    """Who chooses the codes when a window is rounded for good."""
    objective: Objective
    """What a block is fitted to."""
    optimizer: OptimizerFactory
    """Optimizer of a window's parameter groups."""
    learning_rates: LearningRates
    """Step sizes by kind of parameter."""
    decay: Decay
    """How the step sizes fall over a window's steps."""
    batch_size: int
    """Windows of text per optimizer step."""
    plan: WindowPlan
    """Which blocks are fitted together."""
    streams: StreamStorage
    """How activations are cached."""
    compiled: bool | None
    """Whether training steps run through torch.compile; None: on a GPU."""
    captured: bool | None
    """Whether training steps are recorded as a CUDA graph; None: on a GPU."""
    layout: Layout
    """How the checkpoint's words are filled; matters for 3, 5, 6 and 7 bits."""
    keep_best: bool = False
    """Whether the parameters of the step whose batch had the least loss are one more candidate."""
    rotation: Rotation | None = None
    """Of the stream between blocks, before anything else; None: none."""
    inputs: Literal["quantized", "full"] = "quantized"
    """What enters a block in training: what the blocks before it answer as they are quantized, or in full precision."""
    diagonal_guard: bool = False
    """Whether each window with affine matrices is also trained with these kept diagonal, as one more candidate."""
    tuning: ScaleTuning | None = None
    """What follows once every block is rounded; None: nothing."""

    def __post_init__(self) -> None:
        rounded = self.scheme.activation is not None or self.scheme.key_value is not None
        if self.rounder.asymmetric and rounded:
            raise RequestError(
                f"An asymmetric rounder compares unquantized activations, got scheme {self.scheme}: choose one with "
                "a16 and no kv, or GPTQ with asymmetry 0."
            )
