"""Invertibility under stress: random blocks, hostile hyper-parameters, bad starting scales.

Each trial fits one block of a random grouped-query model with stability factor, step sizes, starting scales, scheme and
way to invert drawn at random, far beyond sensible values, with and without the projection to diagonal dominance. It
counts crashes, results that are not finite, transforms that are singular after training, and what was kept of each fit.

    python benchmarks/stability.py --trials 500
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from aq_lightning.calibration import LiveWindow, Pairs, Position, capture, fit, observed
from aq_lightning.models.llama import SPEC
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.objectives import BlockMSE
from aq_lightning.quantizers import LearnedClipping
from aq_lightning.recipe import LearningRates, Recipe, StreamStorage, WindowPlan
from aq_lightning.rounders import Nearest
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Affine, Diagonal, RopePair, Shift
from callbacks import ConditionNumber, GradualMask

CPU = torch.device("cpu")
EPOCHS, SAMPLES, LENGTH = 4, 8, 16


def model_of(draw: random.Random) -> Pretrained:
    """A random model of one block whose weights and embeddings are scaled by up to 100 either way."""
    torch.manual_seed(draw.randrange(2**31))
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=draw.choice([1, 2, 4]),
        dtype="float32",
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(10 ** draw.uniform(-2, 2))
            parameter[:, draw.randrange(parameter.shape[1])] *= draw.choice([0, 1, 100])  # a dead or outlying channel
    return Pretrained(Source("random"), model, None, SPEC)


def recipe_of(draw: random.Random, dominance: float | None) -> Recipe:
    """Step sizes up to 0.1 and far beyond, stability factors from 1 to 1e-3."""
    method = draw.choice(["lu", "newton"])
    affine = partial(Affine, stability=10 ** draw.uniform(-3, 0), dominance=dominance, inverse=method)
    diagonal = partial(Diagonal, alpha=draw.choice([None, 0.0, 0.5, 1.0]))
    return Recipe(
        scheme=Scheme.parse(draw.choice(["w2a16", "w2a16g32", "w3a16", "w4a4", "w2a8sym"])),
        transforms={
            "attention_input": [Shift, diagonal],
            "query_key": [RopePair],
            "value_output": [diagonal, affine],
            "mlp_input": [Shift, diagonal],
            "mlp_hidden": [diagonal],
        },
        weight_quantizer=LearnedClipping,
        rounder=Nearest(),
        objective=BlockMSE(same_input=False),
        optimizer=torch.optim.AdamW,
        learning_rates=LearningRates(10 ** draw.uniform(-4, 1), 10 ** draw.uniform(-4, 1)),
        decay=draw.choice(["none", "cosine"]),
        batch_size=4,
        plan=WindowPlan(),
        streams=StreamStorage("float32", "host"),
        compiled=False,
        captured=False,
        layout="padded",
        diagonal_guard=draw.random() < 0.25,
    )


def trial(seed: int, dominance: float | None) -> str:
    """One fit; returns what was kept of it. Raises AssertionError if anything is not finite or not invertible."""
    draw = random.Random(seed)
    pretrained, recipe = model_of(draw), recipe_of(draw, dominance)
    windows = torch.randint(64, (SAMPLES, LENGTH))
    stream, arguments = capture(pretrained.shell(), windows, recipe.streams, CPU)
    live = LiveWindow(pretrained, pretrained.window([0]), arguments, recipe, CPU)
    with observed(live.blocks, SPEC.sites) as activations:
        target = live.run(stream)
    with tempfile.TemporaryDirectory() as root:

        def trainer() -> Trainer:
            quiet = dict.fromkeys(
                ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
            )
            return Trainer(
                accelerator="cpu", devices=1, max_epochs=EPOCHS, callbacks=[GradualMask(), ConditionNumber()],
                default_root_dir=Path(root), **quiet,
            )  # fmt: skip

        result = fit(
            live, Position(0, 0, 1), activations, (stream, target), trainer, lambda: Pairs(stream, target, 4, seed)
        )
    for matrix in result.module.matrices():
        effective = matrix.effective().detach()
        identity = torch.eye(effective.shape[-1], dtype=effective.dtype)
        residual = (effective @ torch.linalg.inv(effective) - identity).abs().max()
        assert residual < 1e-8, f"singular: residual {float(residual):.1e}"
        assert dominance is None or float(matrix.margin()) >= 1 - dominance - 1e-9, "not dominant"
    live.merge(result.module.blocks, [{} for _ in live.blocks])
    loss = live.loss(live.blocks, stream, target)
    assert math.isfinite(loss), "the merged block is not finite"
    assert loss <= 1.01 * min(result.losses.values()) + 1e-12, "worse than an alternative"
    return result.outcome if result.attempts == 1 else f"{result.outcome} (attempts: {result.attempts})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500, help="fits with the projection, and as many without")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for dominance in (0.9, None):
        kept: Counter[str] = Counter()
        for seed in range(arguments.first, arguments.first + arguments.trials):
            try:
                kept[trial(seed, dominance)] += 1
            except AssertionError as failure:
                kept[f"FAILED: {str(failure).partition(':')[0]}"] += 1
            except Exception as crash:
                kept[f"CRASHED: {type(crash).__name__}"] += 1
                print(f"seed {seed}: {crash!r}")
        print(f"dominance {dominance}, {arguments.trials} random blocks: " + ", ".join(
            f"{count} {outcome}" for outcome, count in kept.most_common()
        ))  # fmt: skip


if __name__ == "__main__":
    main()
