"""GGUF, read by the package gguf and by transformers, which know nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from aq_lightning.errors import RequestError
from aq_lightning.export import formats, parity
from aq_lightning.export.gguf import compress, decompress, read
from aq_lightning.export.gguf_metadata import gguf_name, hf_name, rotary
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid

EXACT = {
    "Q4_0": [Grid(4, 32, True), Grid(4, None, True), Grid(3, 64), Grid(2, 32), Grid(2, 32, True)],
    "Q8_0": [Grid(8, 32, True), Grid(7, 64), Grid(4, None), Grid(3, 32)],
}
MODELS = ["llama", "llama-biased", "mistral", "qwen2", "qwen3"]
WINDOWED = ("mistral", "qwen2")
NAMES = {"Q4_0": "gguf-q4_0", "Q4_1": "gguf-q4_1", "Q8_0": "gguf-q8_0"}
PLAIN = {"sliding_window": None, "use_sliding_window": False}
FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def theirs(data: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind, grid", [(kind, grid) for kind, grids in EXACT.items() for grid in grids], ids=str)
def test_blocks_are_exact(minmax: Callable[..., QTensor], kind: str, grid: Grid) -> None:
    tensor = minmax(torch.randn(24, 128), grid, torch.float16)
    data = compress(tensor, kind)
    assert torch.equal(theirs(data, kind), tensor.dequantize(torch.float32))
    assert parity.difference(tensor, decompress(data, kind)) == ""


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, None), Grid(3, 64), Grid(4, 32, True)], ids=str)
def test_q4_1_rounds_the_least_value_alone(minmax: Callable[..., QTensor], grid: Grid) -> None:
    tensor = minmax(torch.randn(24, 128) + 0.5, grid, torch.float16)
    data = compress(tensor, "Q4_1")
    repeat = 4 // tensor.scale.shape[1]
    scale, zero = (part.repeat_interleave(repeat, 1)[..., None].float() for part in (tensor.scale, tensor.zero))
    expected = tensor.codes.unflatten(1, (4, 32)) * scale + (-zero * scale).half().float()
    assert torch.equal(theirs(data, "Q4_1"), expected.flatten(1))
    assert parity.difference(tensor, decompress(data, "Q4_1")) == ""


def test_scales_of_other_dtypes(minmax: Callable[..., QTensor]) -> None:
    """A bfloat16 is a float16 unless it is very small or large; a group of zeros needs no scale."""
    weight = torch.randn(4, 64)
    weight[0, :32] = 0
    tensor = minmax(weight, Grid(4, 32, True), torch.bfloat16)
    data = compress(tensor, "Q4_0")
    assert torch.equal(theirs(data, "Q4_0"), tensor.dequantize(torch.float32))
    with pytest.raises(RequestError, match="scales that are float16 numbers, got"):
        compress(minmax(weight * 1e-6, Grid(4, 32, True), torch.bfloat16), "Q4_0")


def test_names_both_ways() -> None:
    name = "model.layers.17.self_attn.q_proj.bias"
    assert gguf_name(name) == "blk.17.attn_q.bias" and hf_name("blk.17.attn_q.bias") == name
    assert hf_name("rope_freqs.weight") is None
    with pytest.raises(RequestError, match="got none for model.layers.0.mlp.experts.gate"):
        gguf_name("model.layers.0.mlp.experts.gate")


def test_rows_of_queries_lie_in_pairs(quantized: Callable) -> None:
    made = quantized("llama", "w4a16g32sym")  # 4 query heads of 16 channels on 2 key-value heads
    name = "model.layers.0.self_attn.k_proj.weight"
    tensor = made.weights[name]
    moved = rotary(tensor, name, made.subject)
    rows = [head * 16 + half * 8 + pair for head in range(2) for pair in range(8) for half in range(2)]
    assert torch.equal(moved.codes, tensor.codes[rows]) and torch.equal(moved.scale, tensor.scale[rows])
    other = "model.layers.0.self_attn.v_proj.weight"
    assert rotary(made.weights[other], other, made.subject) is made.weights[other]


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("model", MODELS)
def test_transformers_computes_the_same(quantized: Callable, tmp_path: Path, model: str, kind: str) -> None:
    """Of the model that the file alone describes, but for biases and head sizes that transformers does not look for."""
    made, form = quantized(model, "w4a16g32sym", **(PLAIN if model in WINDOWED else {})), formats.named(NAMES[kind])
    form.check(made.subject)
    out = made.write(form, tmp_path / "out")
    parity.check(out, form, made.subject, made.shards())
    file = f"model-{kind}.gguf"
    assert [path.name for path in out.iterdir()] == [file]
    config = AutoConfig.from_pretrained(out, gguf_file=file)
    assert [getattr(config, field) for field in FIELDS] == [getattr(made.model.config, field) for field in FIELDS]
    assert config.rms_norm_eps == pytest.approx(made.model.config.rms_norm_eps)
    assert config.rope_parameters["rope_theta"] == made.model.config.rope_parameters["rope_theta"]
    given = {"config": made.model.config} if model in ("llama-biased", "qwen3") else {}
    loaded = AutoModelForCausalLM.from_pretrained(out, gguf_file=file, dtype=torch.float32, **given)
    error = float((parity.logits(loaded) - parity.logits(made.model)).norm() / parity.logits(made.model).norm())
    assert error <= (0.06 if kind == "Q4_1" else 1e-5)
    assert parity.logits(made.model).std() > 0.01


def test_the_context_ends_with_the_window(quantized: Callable, tmp_path: Path) -> None:
    """llama.cpp attends to everything, which is the same up to there."""
    out = quantized("mistral", "w4a16g32sym").write(formats.named("gguf-q4_0"), tmp_path / "out")
    assert gguf.GGUFReader(out / "model-Q4_0.gguf").fields["llama.context_length"].contents() == 6


def test_tied_embeddings_and_bfloat16(quantized: Callable, tmp_path: Path) -> None:
    made, form = quantized("llama", "w4a16g32sym", torch.bfloat16, tie_word_embeddings=True), formats.named("gguf-q4_0")
    out = made.write(form, tmp_path / "out")
    parity.check(out, form, made.subject, made.shards())
    _, weights = read(out)
    assert "lm_head.weight" not in weights and weights["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_scaled_rotary_embedding(quantized: Callable, tmp_path: Path) -> None:
    """A factor for each frequency: 1 for the fast ones, the scaling's own for the slow ones."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    made, form = quantized("llama", "w4a16g32sym", rope_parameters=scaling), formats.named("gguf-q4_0")
    form.check(made.subject)
    out = made.write(form, tmp_path / "out")
    parity.check(out, form, made.subject, made.shards())
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out / "model-Q4_0.gguf").tensors}
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    factors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
    assert torch.allclose(plain / factors, made.model.model.rotary_emb.inv_freq)
    assert factors[0] == 1.0 and factors[-1] == 8.0


def test_the_tokenizer_travels(quantized: Callable, tmp_path: Path, tokenizer_files: list[Path]) -> None:
    out = quantized("qwen2", "w4a16g32sym").write(formats.named("gguf-q4_0"), tmp_path / "out")
    ours = PreTrainedTokenizerFast.from_pretrained(tokenizer_files[0].parent)
    loaded = AutoTokenizer.from_pretrained(out, gguf_file="model-Q4_0.gguf")
    text = "the cat ate  the hat on that dishes"
    assert loaded(text)["input_ids"] == ours(text)["input_ids"] and len(ours(text)["input_ids"]) > 8
    assert loaded.chat_template == ours.chat_template
    fields = gguf.GGUFReader(out / "model-Q4_0.gguf").fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("padding", "bos", "eos")] == [0, 1, 2]
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 96  # as many as the model has


@pytest.mark.parametrize("model, scheme, kind, message", [
    ("llama", "w4a4", "Q4_0", "quantizes activations too"),
    ("llama", "w4a16g32", "Q4_0", "Q4_0 holds up to 3 bits, or 4 with symmetric weights, got w4a16g32: export gguf-q4"),
    ("llama", "w8a16g32", "Q8_0", "Q8_0 holds up to 7 bits, or 8 with symmetric weights"),
    ("llama", "w5a16g32", "Q4_1", "export gguf-q8_0"),
    ("llama", "w3a16g8", "Q4_0", "a scale for each 32 inputs, got groups or inputs of 8"),
    ("phi3", "w4a16g32sym", "Q4_0", "written for llama, mistral, qwen2, qwen3 here, got phi3"),
])  # fmt: skip
def test_refusals_before_any_work(quantized: Callable, model: str, scheme: str, kind: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        formats.named(NAMES[kind]).check(quantized(model, scheme).subject)


def test_refusals_of_configurations(quantized: Callable) -> None:
    subject, form = quantized("qwen3", "w4a16g32sym").subject, formats.named("gguf-q4_0")
    for changes, message in [
        ({"attention_bias": True}, "graph of qwen3 reads no biases of attention_bias"),
        ({"num_experts": 8}, "written for dense models here, got num_experts 8"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "embedding, got linear"),
    ]:
        with pytest.raises(RequestError, match=message):
            form.check(replace(subject, config={**subject.config, **changes}))
    with pytest.raises(RequestError, match=r"holds the tokenizer of a tokenizer\.json, got no files"):
        form.check(replace(subject, files=()))
