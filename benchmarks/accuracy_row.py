"""One row of benchmarks/accuracy.py in this process: quantizes a model, and scores what transformers loads of it.

It is called as ``python benchmarks/accuracy_row.py TASK.json RESULT.json``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from aq_lightning.cli import main as train
from aq_lightning.comparison import nearest_bits
from aq_lightning.data import TokenWindows, protocol_windows
from aq_lightning.models.loading import load
from aq_lightning.scheme import Scheme
from aq_lightning.scoring import Assessment, Opened, Opening
from aq_lightning.scoring.answers import Whole
from benchmarks.rows import write

PEERS = {"auto-round": ("auto_round",), "llm-compressor": ("llmcompressor", "llmcompressor.modifiers.gptq")}
"""Method → the modules of its package."""

Task = Mapping[str, Any]


def ours(task: Task, out: Path) -> tuple[Path, dict[str, Any]]:
    """`train.py fit`; goes on with what a stopped attempt left."""
    run = out / "run"
    train(
        ["fit", f"--config={task['config']}", f"--model.pretrained={task['model']}", f"--model.scheme={task['scheme']}"]
        + [f"--data.source={task['text']}", f"--data.evaluation={first(task)}", "--data.evaluation_samples=1"]
        + [f"--data.samples={task['samples']}", f"--data.length={task['length']}", f"--data.seed={task['seed']}"]
        + [f"--seed_everything={task['seed']}", f"--trainer.accelerator={task['device']}", *task["further"]]
        + [f"--out={run}"]
    )
    row = json.loads((run / "results.json").read_text())["rows"][-1]
    return run / "checkpoint", {"bits": row["bits"], "overhead": row["overhead"]}


def full_precision(task: Task, out: Path) -> tuple[Path, dict[str, Any]]:
    """The model as it is."""
    return Path(task["model"]), {"bits": 16.0}


def auto_round(task: Task, out: Path) -> tuple[Path, dict[str, Any]]:
    """AutoRound with its own defaults; the result is written dequantized, for transformers alone to load."""
    from auto_round import AutoRound

    scheme = Scheme.parse(task["scheme"])
    AutoRound(
        model=str(task["model"]),
        tokenizer=AutoTokenizer.from_pretrained(task["model"]),
        bits=scheme.weight.bits,
        group_size=scheme.weight.group_size or -1,
        sym=scheme.weight.symmetric,
        iters=task["iterations"],
        nsamples=task["samples"],
        seqlen=task["length"],
        batch_size=min(8, task["samples"]),
        dataset=[{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in windows(task).split(1)],
        seed=task["seed"],
        device_map="cpu" if task["device"] == "cpu" else 0,
    ).quantize_and_save(str(out / "checkpoint"), format="fake")
    return checkpoint_in(out / "checkpoint"), {"bits": nominal_bits(task), "version": version("auto-round")}


def llm_compressor(task: Task, out: Path) -> tuple[Path, dict[str, Any]]:
    """llm-compressor's GPTQ with its own defaults, written compressed."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    scheme = Scheme.parse(task["scheme"])
    grid = {
        "num_bits": scheme.weight.bits,
        "type": "int",
        "symmetric": scheme.weight.symmetric,
        "strategy": "group" if scheme.weight.group_size else "channel",
        "group_size": scheme.weight.group_size,
    }
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    rows = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in windows(task)]
    oneshot(
        model=model,  # which it moves to the device itself, part by part
        tokenizer=tokenizer,
        dataset=DataLoader(rows, batch_size=1),
        recipe=GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": grid}}, ignore=["lm_head"]),
        num_calibration_samples=task["samples"],
        max_seq_length=task["length"],
    )
    model.save_pretrained(out / "checkpoint", save_compressed=True)
    tokenizer.save_pretrained(out / "checkpoint")
    return out / "checkpoint", {"bits": nominal_bits(task), "version": version("llmcompressor")}


METHODS: dict[str, Callable[[Task, Path], tuple[Path, dict[str, Any]]]] = {
    "full precision": full_precision,
    "auto-round": auto_round,
    "llm-compressor": llm_compressor,
}
"""What is not a configuration of ours."""


def first(task: Task) -> str:
    """The text that `fit` itself scores one window of."""
    return next(iter(task["texts"].values()))


def windows(task: Task) -> Tensor:
    """The calibration windows that `fit` takes too, int64 (samples, length)."""
    data = TokenWindows(task["model"], task["text"], first(task), task["samples"], task["length"], seed=task["seed"])
    data.attach_tokenizer(AutoTokenizer.from_pretrained(task["model"]))
    return data.calibration()


def nominal_bits(task: Task) -> float:
    """Effective bits per weight of the scheme's grid on the model: codes, scales, zero points, biases."""
    model = load(task["model"])
    return nearest_bits(model.blocks, Scheme.parse(task["scheme"]).weight, model.storage)


def checkpoint_in(directory: Path) -> Path:
    """Where below it the model lies: some tools add a folder named after model and scheme."""
    return next(iter(sorted(directory.rglob("config.json")))).parent


def opened(checkpoint: Path, task: Task) -> Opened:
    """What transformers loads, in float32; a checkpoint with online products, which it cannot, as this package does."""
    device = torch.device(task["device"])
    config = json.loads((checkpoint / "config.json").read_text())
    if (config.get("quantization_config") or {}).get("quant_method") == "aq_lightning":
        return Opening(device, loader="own").open(str(checkpoint))
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    absent = set(report["missing_keys"]) - set(model.all_tied_weights_keys)
    if absent:
        raise SystemExit(f"error: transformers does not find {sorted(absent)[:3]} in {checkpoint}.")
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    return Opened(str(checkpoint), Whole(model, device), tokenizer, float("nan"), 0.0, "transformers")


def scored(checkpoint: Path, task: Task) -> dict[str, Any]:
    """Perplexity of a checkpoint on every text, its standard error, and who read it."""
    model = opened(checkpoint, task)
    length, most = task["evaluation_length"], task["most"]
    texts = {name: protocol_windows(source, model.tokenizer, length, most) for name, source in task["texts"].items()}
    scores = Assessment(texts, tokens=length).of(model).scores
    return {
        "perplexity": {name: score.value for name, score in scores.items()},
        "error": {name: score.error for name, score in scores.items()},
        "reader": model.reader,
    }


def main() -> None:
    task, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    del sys.argv[1:]  # Lightning's command line warns of arguments beside those that it is given
    out = target.with_suffix("")
    out.mkdir(exist_ok=True)
    made = out / "made.json"
    if not made.is_file():
        for module in PEERS.get(task["method"], ()):
            import_module(module)  # is not what takes its time
        spent, began = target.with_suffix(".spent"), time.monotonic()
        before = float(spent.read_text()) if spent.is_file() else 0.0
        checkpoint, facts = METHODS.get(task["method"], ours)(task, out)
        facts |= {"checkpoint": str(checkpoint), "minutes": (before + time.monotonic() - began) / 60}
        write(made, facts)
    facts = json.loads(made.read_text())
    write(target, {**facts, **scored(Path(facts["checkpoint"]), task)})


if __name__ == "__main__":
    main()
