"""No directory takes its name before it says what the quantized model says; a flipped bit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aq_lightning.errors import ParityError
from aq_lightning.export import formats, parity
from aq_lightning.export.directory import read_config, verified

SCHEMES = {
    "compressed-tensors": ["w4a16g32", "w3a16", "w4a4g32", "w8a8sym"],
    "gptq": ["w4a16g32sym", "w3a16sym"],
    "gptq_v2": ["w4a16g32", "w2a16"],
    "awq": ["w4a16g32", "w4a16sym"],
    "gguf-q4_0": ["w4a16g32sym", "w3a16g64"],
    "gguf-q4_1": ["w4a16g32", "w2a16"],
    "gguf-q8_0": ["w8a16g32sym", "w6a16"],
    "dense": ["w4a16g32"],
}
CASES = [(name, scheme) for name, schemes in SCHEMES.items() for scheme in schemes]
WIDE = {"intermediate_size": 128}  # groups of 64 divide it


def test_every_format_is_swept() -> None:
    assert set(SCHEMES) == set(formats.NAMES)


@pytest.mark.parametrize("name, scheme", CASES)
def test_what_is_written_passes(quantized: Callable, tmp_path: Path, name: str, scheme: str) -> None:
    made, form = quantized("llama", scheme, **WIDE), formats.named(name)
    form.check(made.subject)
    out = made.write(form, tmp_path / "out")
    verdict = parity.check(out, form, made.subject, made.shards())
    assert verdict.weights == len(made.weights)
    assert ("transformers' logits differ by" in verdict.client) == (name not in ("gptq", "gptq_v2", "awq"))
    if name == "compressed-tensors":
        assert "differ by 0.0e+00 with all 2 blocks (at most 0.0e+00)" in verdict.client


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["compressed-tensors", "dense", "awq"])
def test_other_dtypes_pass(quantized: Callable, tmp_path: Path, name: str, storage: torch.dtype) -> None:
    made, form = quantized("llama", "w4a16g32", storage), formats.named(name)
    out = made.write(form, tmp_path / "out")
    assert parity.check(out, form, made.subject, made.shards()).weights == len(made.weights)


@pytest.mark.parametrize("name, part", [
    ("compressed-tensors", "weight_packed"), ("gptq_v2", "qweight"), ("gptq_v2", "qzeros"), ("awq", "qweight"),
    ("awq", "scales"), ("dense", "weight"),
])  # fmt: skip
def test_a_flipped_bit_is_named(quantized: Callable, tmp_path: Path, name: str, part: str) -> None:
    made, form = quantized("llama", "w4a16g32"), formats.named(name)
    out = made.write(form, tmp_path / "out")
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        stored = tensors.get(f"model.layers.1.mlp.up_proj.{part}")
        if stored is not None:
            stored.view(torch.uint8).view(-1)[0] ^= 1
            save_file(tensors, file, {"format": "pt", "aq_lightning.layout": "padded"})
    with pytest.raises(ParityError, match=r"got 1 of \d+ that differ in .*model\.layers\.1\.mlp\.up_proj\.weight diff"):
        parity.check(out, form, made.subject, made.shards())


@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q4_1", "gguf-q8_0"])
def test_a_flipped_bit_of_a_gguf_is_named(quantized: Callable, tmp_path: Path, name: str) -> None:
    made, form = quantized("llama", "w4a16g32sym"), formats.named(name)
    out = made.write(form, tmp_path / "out")
    (file,) = out.glob("*.gguf")
    content = bytearray(file.read_bytes())
    content[-2] ^= 16  # the last tensor's last row
    file.write_bytes(content)
    with pytest.raises(ParityError, match=r"got 1 of \d+ that differ"):
        parity.check(out, form, made.subject, made.shards())


def test_missing_and_unknown_tensors_are_named(quantized: Callable, tmp_path: Path) -> None:
    made, form = quantized("llama", "w4a16g32"), formats.named("awq")
    out = made.write(form, tmp_path / "out")
    (first, second), name = made.shards(), "model.norm.weight"
    with pytest.raises(ParityError, match="extra.weight is missing"):
        parity.check(out, form, made.subject, [first, second, {"extra.weight": torch.ones(3)}])
    fewer = {key: value for key, value in second.items() if key != name}
    with pytest.raises(ParityError, match="model.norm.weight is unknown"):
        parity.check(out, form, made.subject, [first, fewer])


@pytest.mark.parametrize("name", ["compressed-tensors", "dense"])
def test_a_client_that_computes_something_else_is_noticed(quantized: Callable, tmp_path: Path, name: str) -> None:
    """Equal weights are not enough: here the configuration that is written scales attention differently."""
    made, form = quantized("llama", "w4a16g32"), formats.named(name)
    out = made.write(form, tmp_path / "out")
    text = (out / "config.json").read_text()
    assert read_config(out)["rms_norm_eps"] == 1e-6
    (out / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    with pytest.raises(ParityError, match=r"at most .*, got .*e-0\d for all 2 blocks"):
        parity.check(out, form, made.subject, made.shards())


def test_a_directory_that_transformers_does_not_load(quantized: Callable, tmp_path: Path) -> None:
    made, form = quantized("llama", "w4a16g32"), formats.named("compressed-tensors")
    out = made.write(form, tmp_path / "out")
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"observer": "minmax"', '"novelty": 1, "observer": "minmax"'))
    subject = made.subject
    with pytest.raises(ParityError, match="transformers must load what is written"):
        parity._ask(form.client(subject), out, form, parity._first_blocks(subject), made.weights, torch.ones(1))


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf-q4_1", "dense"])
def test_large_models_answer_with_their_first_blocks(
    quantized: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(parity, "_MEMORY", 1)
    made, form = quantized("llama", "w4a16g32"), formats.named(name)
    out = made.write(form, tmp_path / "out")
    assert "with the first 1 blocks" in parity.check(out, form, made.subject, made.shards()).client


def test_a_directory_that_fails_stays_beside_its_place(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="differs"), verified(tmp_path / "out") as unverified:
        unverified.mkdir()
        (unverified / "weights").write_text("kept")
        raise ParityError("differs")
    assert [path.name for path in tmp_path.iterdir()] == ["out.unverified"]
    with verified(tmp_path / "out") as unverified:  # written again
        unverified.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
