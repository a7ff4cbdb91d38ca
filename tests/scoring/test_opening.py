"""Models are read by transformers where it can, otherwise here; both say the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CompressedTensorsConfig

from aq_lightning.errors import RequestError
from aq_lightning.scoring import Assessment, Opened, Opening, opening
from aq_lightning.scoring.answers import BlockByBlock, Whole

CPU = torch.device("cpu")
WINDOWS = {"text": torch.randint(3, 96, (4, 24))}


@pytest.fixture(scope="module")
def checkpoint(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint of one scheme, rounded to nearest, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(scheme: str, *more: str) -> Path:
        key = (scheme, *more)
        if key not in made:
            made[key] = fit(scheme, tmp_path_factory.mktemp("run") / "run", *more, config="rtn.yaml") / "checkpoint"
        return made[key]

    return make


def perplexity(opened: Opened) -> float:
    return Assessment(WINDOWS).of(opened).scores["text"].value


@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16sym", "w4a4"])
def test_both_readers_score_the_same(checkpoint: Callable[..., Path], scheme: str) -> None:
    directory = str(checkpoint(scheme))
    own, theirs = (Opening(CPU, loader=loader).open(directory) for loader in ("own", "auto"))
    assert isinstance(own.answers, BlockByBlock) and isinstance(theirs.answers, Whole)
    assert own.reader == "this package, block by block (as asked for)" and theirs.reader == "transformers"
    assert perplexity(own) == perplexity(theirs) and own.bits == theirs.bits < 5


def test_what_transformers_would_misread_is_read_here(checkpoint: Callable[..., Path]) -> None:
    """Its compressed-tensors takes dense words for padded ones without a word."""
    directory = checkpoint("w3a16g32", "--model.layout=dense")
    opened = Opening(CPU).open(str(directory))
    assert "does not read the dense layout" in opened.reader
    assert perplexity(opened) == perplexity(Opening(CPU).open(str(checkpoint("w3a16g32"))))
    with pytest.raises(RequestError, match="transformers is to read .* cannot .*dense layout"):
        Opening(CPU, loader="transformers").open(str(directory))


def test_a_model_too_large_at_once_is_read_block_by_block(
    checkpoint: Callable[..., Path], model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, full = str(checkpoint("w4a16g32")), str(model_directory)
    whole = [perplexity(Opening(CPU).open(name)) for name in (quantized, full)]
    monkeypatch.setattr(opening, "fits", lambda *_: False)
    parts = [Opening(CPU).open(name) for name in (quantized, full)]
    assert all("block by block" in opened.reader for opened in parts) and "too large" in parts[0].reader
    assert [perplexity(opened) for opened in parts] == whole and parts[1].bits == 16


@pytest.mark.parametrize("model_type, kind", [("bert", "encoder"), ("vit", "encoder"), ("t5", "encoder–decoder")])
def test_encoders_are_refused_by_name(tmp_path: Path, model_type: str, kind: str) -> None:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "d_model": 16,
    }
    t5 = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    config = AutoConfig.for_model(model_type, **(t5 | {"d_model": 16} if model_type == "t5" else sizes))
    AutoModel.from_config(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=f"an {kind} of type {model_type}"):
        Opening(CPU).open(str(tmp_path))


def test_another_method_goes_to_transformers(tmp_path: Path) -> None:
    """A format that this package does not read, here compressed-tensors with a section of another kind; the bits are
    those in the files."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    section = CompressedTensorsConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        format="naive-quantized", ignore=["lm_head"], quantization_status="compressed",
    ).to_dict()  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "proj.weight" in name]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 448
        tensors[f"{name}_scale"] = scale
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    opened = Opening(CPU).open(str(tmp_path))
    assert opened.reader == "transformers" and 8 < opened.bits < 9
    assert perplexity(opened) == pytest.approx(perplexity(_full(model)), rel=0.05)
    with pytest.raises(RequestError, match="pack-quantized"):
        Opening(CPU, loader="own").open(str(tmp_path))


def _full(model: AutoModelForCausalLM) -> Opened:
    return Opened("full", Whole(model, CPU), word_tokenizer(), 32.0, 0.0, "")


def test_a_checkpoint_without_some_tensors_is_not_made_up(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("w4a16g32")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.norm.weight")
    note = {"format": "pt", "aq_lightning.layout": "padded"}
    save_file(tensors, tmp_path / "model.safetensors", note)
    with pytest.raises(RequestError, match="model.norm.weight"):
        Opening(CPU).open(str(tmp_path))


def test_divergence_from_itself_and_from_another(checkpoint: Callable[..., Path], model_directory: Path) -> None:
    """By hand: Σ p (log p − log q) over all predictions but each window's last, and how often both are of one mind."""
    full, quantized = (Opening(CPU).open(str(each)) for each in (model_directory, checkpoint("w2a16g32")))
    same = Assessment(WINDOWS).of(full, full).scores
    assert list(same) == ["text", "KL", "top-1"] and same["KL"].value == 0 and same["top-1"].value == 1
    found = Assessment(WINDOWS, tokens=48).of(quantized, full).scores
    p, q = (
        torch.cat(list(each.answers.logits([WINDOWS["text"]], 24))).double()[:, :-1].log_softmax(-1)
        for each in (full, quantized)
    )
    assert found["KL"].value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found["top-1"].value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found["KL"].value > 0 and found["KL"].error > 0 and not math.isnan(found["top-1"].error)


def test_models_that_do_not_go_together(model_directory: Path, tmp_path: Path) -> None:
    full = Opening(CPU).open(str(model_directory))
    other = Opened("other", Whole(tiny_llama(vocab_size=90), CPU), word_tokenizer(), 32.0, 0.0, "")
    with pytest.raises(RequestError, match="predicts the same tokens, got 96 .* for 90"):
        Assessment({"text": WINDOWS["text"] % 90}).of(other, full)
    with pytest.raises(RequestError, match="share a tokenizer"):
        Assessment({"text": torch.full((1, 8), 95)}).of(other)
