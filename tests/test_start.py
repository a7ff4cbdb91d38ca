"""A run on a directory of 7 billion weights begins at once: nothing is read that the first block does not need."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, ROOT, word_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

SECONDS = 20  # of computing, imports included
UNTIL_THE_FIRST_PASS = """
import os, resource, sys
from aq_lightning import comparison

def first_pass(*_):
    print("began after", sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), flush=True)
    os._exit(0)

comparison.Comparison.baselines = first_pass
from aq_lightning.cli import main
main(sys.argv[1:])
"""


def hollow_llama_7b(directory: Path) -> Path:
    """LLaMA-7B whose file has a true header and, behind it, 13 GB of zeros that take no room on the disk."""
    directory.mkdir()
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, dtype="float16")
    config.save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 13e9
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems would fill the file with zeros")
def test_a_7b_run_begins_within_seconds(tmp_path: Path, text_file: Path) -> None:
    model = hollow_llama_7b(tmp_path / "model")
    arguments = [
        "fit", f"--config={CONFIGS / 'affinequant.yaml'}", f"--model.pretrained={model}", "--model.scheme=w4a16g128",
        f"--data.source={text_file}", "--data.samples=2", "--data.length=16", "--data.evaluation_length=16",
        "--data.evaluation_samples=2", "--trainer.accelerator=cpu", f"--out={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_THE_FIRST_PASS, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert "began after" in done.stdout, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < SECONDS
