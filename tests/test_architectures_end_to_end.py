"""``fit`` on a tiny model of every architecture: adapted, calibrated, written, and loaded as transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, word_tokenizer
from safetensors.torch import load_file
from tiny import MODELS, avoided_expert, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Tokenizer

from aq_lightning.cli import main
from aq_lightning.export.compressed_tensors import read
from aq_lightning.export.loading import open_model
from aq_lightning.models.lookup import architecture_of
from aq_lightning.qtensor import QTensor
from aq_lightning.transforms.online import carried

EVERYTHING_FOLDS = ("llama", "llama-biased", "opt", "opt-unbiased")
"""Models that take every factor of configs/affinequant.yaml."""


def letter_tokenizer() -> Qwen2Tokenizer:
    """A byte a token: transformers gives every Qwen 2 directory this class."""
    letters = ["<|endoftext|>", *"word0123456789Ġ"]
    return Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])


def random_model(name: str, **changes: object) -> PreTrainedModel:
    """With random gains and biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    return model


def saved(model: PreTrainedModel, path: Path) -> Path:
    """The model as transformers saves it."""
    model.half().save_pretrained(path)
    tokenizer = word_tokenizer() if model.config.model_type != "qwen2" else letter_tokenizer()
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def directory(name: str, tmp_path: Path) -> Path:
    return saved(random_model(name), tmp_path / "model")


def difference_of_experts(checkpoint: Path, ids: Tensor) -> float:
    """Greatest difference of logits from transformers', which keeps experts in the checkpoint's own precision."""
    ours, _, _ = open_model(str(checkpoint))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    ours.config._experts_implementation = theirs.config._experts_implementation
    difference = float((theirs(ids).logits - ours(ids).logits).abs().max())
    kept = theirs.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in ours.state_dict().items())
    return difference


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", list(MODELS))
def test_fit_and_load(
    directory: Path, fit: Callable[..., Path], capsys: pytest.CaptureFixture, tmp_path: Path, name: str
) -> None:
    # Groups of 8 divide every width of these models.
    experts = bool(architecture_of(tiny_config(name)).experts)
    scheme = "w3a16g8sym" if experts else "w3a16g8"  # transformers reads experts of symmetric grids only
    run = fit(scheme, tmp_path / "run", f"--model.pretrained={directory}")
    blocks = [json.loads(path.read_text()) for path in sorted(run.glob("blocks/*/metrics.json"))]
    assert len(blocks) == 2
    assert all(block["loss"] <= 1.001 * min(block["rtn_loss"], block["initial_loss"]) for block in blocks)
    assert ("left out:" in capsys.readouterr().out) == (name not in EVERYTHING_FOLDS)
    ids = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
    ours, _, _ = open_model(str(run / "checkpoint"), torch.float32)
    with torch.no_grad():
        reference = ours(ids).logits
        assert torch.isfinite(reference).all()
        if experts:
            assert difference_of_experts(run / "checkpoint", ids) == 0.0
        elif not name.startswith("falcon"):  # whose linears read their weight themselves: no compressed form runs
            theirs = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
            assert (theirs(ids).logits - reference).abs().max() == 0.0
        full = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        assert (full(ids).logits - reference).abs().max() > 1e-3, "rounding to 3 bits is seen"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_with_quantized_activations(
    directory: Path,
    fit: Callable[..., Path],
    text_file: Path,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    name: str,
) -> None:
    """``test`` of the checkpoint gives the run's own perplexity; the checkpoint names its routers as unquantized."""
    run = fit("w4a8g8", tmp_path / "run", f"--model.pretrained={directory}")
    assert "read experts of symmetric schemes only, such as w4a8g8sym" in capsys.readouterr().out
    rows = {row["model"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    main(
        ["test", f"--config={CONFIGS / 'affinequant.yaml'}", f"--model.pretrained={run / 'checkpoint'}"]
        + [f"--data.source={text_file}", "--data.evaluation_length=32", "--trainer.accelerator=cpu"]
        + [f"--out={tmp_path / 'scored'}"]
    )
    (scored,) = json.loads((tmp_path / "scored/test.json").read_text())["rows"]
    assert scored["perplexity"] == rows["affinequant"]["perplexity"] != rows["full precision"]["perplexity"]
    assert rows["round to nearest"]["bits"] == 4 + (16 + 4) / 8
    assert scored["bits"] == rows["affinequant"]["bits"] >= rows["round to nearest"]["bits"], "biases count"
    ignored = json.loads((run / "checkpoint/config.json").read_text())["quantization_config"]["ignore"]
    router = "block_sparse_moe.gate" if name == "mixtral" else "mlp.gate"
    assert ignored == ["lm_head", f"model.layers.0.{router}", f"model.layers.1.{router}"]
    _, checkpoint = read(run / "checkpoint")
    assert all(not isinstance(checkpoint[f"{path}.weight"], QTensor) for path in ignored)


def test_expert_that_no_token_reaches_is_safe(fit: Callable[..., Path], tmp_path: Path) -> None:
    """It is quantized and written like the others, and nothing about it spoils the run."""
    model = avoided_expert(random_model("mixtral", num_local_experts=5))
    run = fit("w3a16g8sym", tmp_path / "run", f"--model.pretrained={saved(model, tmp_path / 'model')}")
    for block in range(2):
        metrics = json.loads((run / f"blocks/000{block}/metrics.json").read_text())
        assert metrics["attempts"] == 1 and metrics["loss"] <= 1.001 * min(metrics["rtn_loss"], metrics["initial_loss"])
        learnt = load_file(run / f"blocks/000{block}/transforms.safetensors")
        assert all(tensor.isfinite().all() for tensor in learnt.values())
    _, checkpoint = read(run / "checkpoint")
    for linear in ("w1", "w2", "w3"):
        tensor = checkpoint[f"model.layers.0.block_sparse_moe.experts.0.{linear}.weight"]
        assert isinstance(tensor, QTensor) and tensor.codes.unique().numel() == 8 and tensor.scale.isfinite().all()


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


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "phi3", "gpt_neox", "bloom"])
def test_fit_and_load_with_kronecker_products(
    directory: Path, fit: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Experts, fused linears, partial rotary embedding, and attention without a place for rounded keys."""
    scheme = "w4a4sym" if name == "bloom" else "w4a4kv4sym"
    run = fit(scheme, tmp_path / "run", f"--model.pretrained={directory}", config="affinequant-online.yaml")
    ids = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
    ours, _, read_scheme = open_model(str(run / "checkpoint"), torch.float32)
    full = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    reference = ours(ids).logits
    for _, online in carried(ours):
        for tensor in online.parameters():
            tensor.copy_(tensor.roll(1, -1))
    assert str(read_scheme) == scheme and torch.isfinite(reference).all()
    assert (reference - full).norm() < 0.5 * (ours(ids).logits - full).norm(), "the products belong to the weights"
