"""Calibration costs in proportion to tokens, epochs and blocks: three sweeps on a small random model, and a straight
line through each.

CPU seconds of one thread, so that what else the machine does counts little; each point is the least of ``--repeats``
whole runs of ``aq_lightning.pipeline.quantize``, from the first pass to the checked checkpoint. Prints a markdown table
and draws ``docs/assets/linearity.svg``.

    OMP_NUM_THREADS=1 python benchmarks/linearity.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from calibration import ROOT, recipe_of
from lightning.pytorch import Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aq_lightning.calibration import RunDirectory
from aq_lightning.models.llama import SPEC
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.pipeline import Job, quantize
from callbacks import GradualMask

SCHEME, LENGTH, VOCABULARY = "w3a16g64", 128, 256
SWEEPS = {"samples": (8, 16, 24, 32), "epochs": (2, 4, 6, 8), "blocks": (2, 4, 6, 8)}
INK, LINE = "#808080", "#3b82c4"  # readable on light pages and on dark ones


@dataclass(frozen=True)
class Size:
    """What is varied; the defaults are where the other two stay."""

    samples: int = 16
    epochs: int = 4
    blocks: int = 4


@dataclass(frozen=True)
class Line:
    """A least-squares line."""

    slope: float
    start: float
    r2: float

    @staticmethod
    def through(x: list[float], y: list[float]) -> Line:
        """The one nearest to the points."""
        design = torch.tensor([[each, 1.0] for each in x], dtype=torch.float64)
        seconds = torch.tensor(y, dtype=torch.float64)
        slope, start = torch.linalg.lstsq(design, seconds[:, None]).solution.flatten()
        left = (seconds - design @ torch.stack([slope, start])).square().sum()
        return Line(float(slope), float(start), float(1 - left / (seconds - seconds.mean()).square().sum()))


def seconds(size: Size) -> float:
    """CPU time of one calibration."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=size.blocks,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH, dtype=torch.float16,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"{index}": index for index in range(VOCABULARY)}, unk_token="0"))
    )
    model = LlamaForCausalLM(config).half().eval().requires_grad_(False)
    recipe = recipe_of("affinequant.yaml", SCHEME)
    windows = torch.randint(VOCABULARY, (size.samples, LENGTH))

    def trainer(root: Path) -> Trainer:
        silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        return Trainer(
            accelerator="cpu", max_epochs=size.epochs, **silent, callbacks=[GradualMask()],
            default_root_dir=root,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        journal = RunDirectory.check(Path(place), "")
        journal.create("", {})
        job = Job(
            Pretrained(Source("random"), model, tokenizer, SPEC), replace(recipe, batch_size=4), journal, trainer,
            torch.device("cpu"), seed=0,
        )  # fmt: skip
        began = time.process_time()
        quantize(job, windows)
        return time.process_time() - began


def draw(points: dict[str, dict[int, float]], lines: dict[str, Line], path: Path) -> None:
    """A panel for each sweep."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "aq_lightning", "font.family": "sans-serif", "font.size": 9,
        "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        for axes, (name, known) in zip(figure.subplots(1, len(points), sharey=True), points.items(), strict=True):
            x, line = list(known), lines[name]
            axes.plot([0, x[-1]], [line.start, line.start + line.slope * x[-1]], color=INK, linewidth=1)
            axes.plot(x, list(known.values()), "o", color=LINE)
            axes.set(xlabel=label(name), xlim=(0, None), ylim=(0, None), title=f"R² = {line.r2:.4f}")
        figure.axes[0].set_ylabel("CPU seconds")
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def label(name: str) -> str:
    """What a sweep varies."""
    return f"samples of {LENGTH} tokens" if name == "samples" else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "linearity.svg")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seconds(Size(4, 1, 1))  # libraries wake up
    points: dict[str, dict[int, float]] = {}
    for name, values in SWEEPS.items():
        points[name] = {
            value: min(seconds(replace(Size(), **{name: value})) for _ in range(given.repeats)) for value in values
        }
    lines = {name: Line.through(list(known), list(known.values())) for name, known in points.items()}
    print("| varied | CPU seconds | seconds for one more | at 0 | R² |")
    print("|---|---|---|---|---|")
    for name, line in lines.items():
        shown = ", ".join(f"{value}: {found:.2f}" for value, found in points[name].items())
        print(f"| {label(name)} | {shown} | {line.slope:.3f} | {line.start:.2f} | {line.r2:.4f} |")
    draw(points, lines, given.out)


if __name__ == "__main__":
    main()
