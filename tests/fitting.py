"""One window fitted, undisturbed or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import tiny_llama
from lightning.pytorch import Callback, Trainer
from transformers import LlamaForCausalLM

from aq_lightning.calibration import BlockCalibration, Fit, LiveWindow, Pairs, Position, capture, fit, observed
from aq_lightning.models.llama import SPEC
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.objectives import BlockMSE
from aq_lightning.quantizers import LearnedClipping, quantized_activations
from aq_lightning.recipe import LearningRates, Recipe, StreamStorage, WindowPlan
from aq_lightning.rounders import Nearest
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Affine, Diagonal, Shift
from callbacks import GradualMask

CPU = torch.device("cpu")
LIGHTNING = pytest.mark.filterwarnings(  # of Lightning itself
    "ignore:.*LeafSpec",
    "ignore:.*does not have many workers",
    "ignore:.*module\\(s\\) in eval mode",
    "ignore:GPU available but not used",
)


def fitted(
    watching: Sequence[Callback] = (),
    epochs: int = 4,
    affine: Callable = Affine,
    model: LlamaForCausalLM | None = None,
    batch: int = 4,
    device: torch.device = CPU,
    **changes: object,
) -> Fit:
    """Fits the first block of a model, by default the tiny one."""
    recipe = Recipe(**{
        "scheme": Scheme.parse("w2a16g32"),
        "transforms": {"value_output": [Diagonal, affine], "mlp_input": [Shift, Diagonal]},
        "weight_quantizer": LearnedClipping,
        "rounder": Nearest(),
        "objective": BlockMSE(),
        "optimizer": torch.optim.Adam,
        "learning_rates": LearningRates(1e-3, 1e-2),
        "decay": "none",
        "batch_size": batch,
        "plan": WindowPlan(),
        "streams": StreamStorage("float32", "host"),
        "compiled": False,
        "captured": False,
        "layout": "padded",
        **changes,
    })  # fmt: skip
    pretrained = Pretrained(Source("random"), (model or tiny_llama()).requires_grad_(False), None, SPEC)
    windows = torch.randint(96, (8, 16), generator=torch.Generator().manual_seed(0))
    stream, arguments = capture(pretrained.shell(), windows, recipe.streams, device)
    live = LiveWindow(pretrained, pretrained.window([0]), arguments, recipe, device)
    with observed(live.blocks, SPEC.sites) as activations:
        target = live.run(stream)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)

    def trainer() -> Trainer:
        plan = {"max_epochs": epochs, "callbacks": [GradualMask(), *watching], "log_every_n_steps": 1}
        return Trainer(accelerator=device.type, devices=1, **plan, **quiet)

    with quantized_activations(live.blocks, recipe.scheme.activation):
        result = fit(
            live, Position(0, 0, 1), activations, (stream, target), trainer, lambda: Pairs(stream, target, batch, 0)
        )
        assert live.loss(result.module.blocks, stream, target) == result.losses[result.outcome]
        assert result.losses[result.outcome] == min(result.losses.values())
        live.merge(result.module.blocks, [{}])
        merged = live.loss(live.blocks, stream, target)
        slack = (
            1.01 if recipe.scheme.activation is None else 1.1
        )  # activations on an edge of their grid fall either way
        assert merged <= slack * result.losses[result.outcome] + 1e-12 and math.isfinite(merged)
    return result


class Sabotage(Callback):
    """Sets parameters whose name contains ``name`` in one epoch of the first attempts."""

    def __init__(self, name: str, value: float, epoch: int, attempts: int = 1) -> None:
        self.name, self.value, self.epoch, self.attempts = name, value, epoch, attempts
        self.begun: list[BlockCalibration] = []

    def on_fit_start(self, trainer: Trainer, module: BlockCalibration) -> None:
        self.begun.append(module)

    def on_train_batch_start(self, trainer: Trainer, module: BlockCalibration, batch, index: int) -> None:
        if len(self.begun) <= self.attempts and trainer.current_epoch == self.epoch and index == 1:
            for name, parameter in module.named_parameters():
                if self.name in name:
                    parameter.data.flatten()[0] = self.value
