"""``fit`` on a tiny model of every architecture: adapted, calibrated, written, and loaded as transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import word_tokenizer
from tiny import MODELS, tiny_config
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from aq_lightning.export.loading import open_model
from aq_lightning.transforms.online import carried

EVERYTHING_FOLDS = ("llama", "llama-biased", "opt", "opt-unbiased")
"""Models that take every factor of configs/affinequant.yaml."""


def letter_tokenizer() -> Qwen2Tokenizer:
    """A byte a token: transformers gives every Qwen 2 directory this class."""
    letters = ["<|endoftext|>", *"word0123456789Ġ"]
    return Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])


@pytest.fixture
def directory(name: str, tmp_path: Path) -> Path:
    """The model as transformers saves it, with random gains and biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    model.half().save_pretrained(tmp_path / "model")
    tokenizer = word_tokenizer() if name != "qwen2" else letter_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", list(MODELS))
def test_fit_and_load(
    directory: Path, fit: Callable[..., Path], capsys: pytest.CaptureFixture, tmp_path: Path, name: str
) -> None:
    # Groups of 8 divide every width of these models.
    run = fit("w3a16g8", tmp_path / "run", f"--model.pretrained={directory}")
    blocks = [json.loads(path.read_text()) for path in sorted(run.glob("blocks/*/metrics.json"))]
    assert len(blocks) == 2
    assert all(block["loss"] <= 1.001 * min(block["rtn_loss"], block["initial_loss"]) for block in blocks)
    assert ("left out:" in capsys.readouterr().out) == (name not in EVERYTHING_FOLDS)
    ids = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
    ours, _, _ = open_model(str(run / "checkpoint"), torch.float32)
    with torch.no_grad():
        reference = ours(ids).logits
        assert torch.isfinite(reference).all()
        if not name.startswith("falcon"):  # whose linears read their weight themselves: no compressed form runs
            theirs = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
            assert (theirs(ids).logits - reference).abs().max() == 0.0
        full = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        assert (full(ids).logits - reference).abs().max() > 1e-3, "rounding to 3 bits is seen"


@pytest.mark.parametrize("name", ["falcon-7b", "gemma2", "opt-gelu", "phi3"])
def test_fit_and_load_online(
    directory: Path, fit: Callable[..., Path], capsys: pytest.CaptureFixture, tmp_path: Path, name: str
) -> None:
    """Norms with gains of 1 + weight, fused consumers, and one norm that attention and MLP both read."""
    run = fit("w3a16g8", tmp_path / "run", f"--model.pretrained={directory}", config="affinequant-dense.yaml")
    printed = capsys.readouterr().out
    norms = 1 if name == "falcon-7b" else 2
    assert printed.count("online: ") == norms and "in each of 2 blocks" in printed
    ids = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
    ours, _, _ = open_model(str(run / "checkpoint"), torch.float32)
    assert len(list(carried(ours))) == 2 * norms
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
        reference = ours(ids).logits
        for _, online in carried(ours):
            online[0].inverse.copy_(torch.eye(64)[None].roll(1, -1))
        broken = ours(ids).logits
    assert torch.isfinite(reference).all()
    assert (reference - full).norm() < 0.5 * (broken - full).norm(), "the products belong to the weights"
