"""transformers computes from a checkpoint exactly what the quantized model computed.

Every difference of logits is 0.0 in float32: codes, scales and zero points arrive unchanged, and the client's
``(u − z) s`` is the same float operation as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from torch import Tensor, nn

from aq_lightning.export.compressed_tensors import load_dense, write
from aq_lightning.qtensor import QTensor, decode, encode, grid_of
from aq_lightning.scheme import Grid, Scheme

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

Quantizer = Callable[[Tensor, Grid, torch.dtype], QTensor]
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 96


def quantize(model: nn.Module, scheme: Scheme, storage: torch.dtype, minmax: Quantizer) -> dict[str, Tensor | QTensor]:
    """The model's tensors with quantized linears; the model itself gets their dequantized weights."""
    tensors: dict[str, Tensor | QTensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            tensors[f"{name}.weight"] = packed = minmax(module.weight.detach(), scheme.weight, storage)
            module.weight.data = packed.dequantize(torch.float32)
    return tensors


def by_layer(tensors: dict[str, Tensor | QTensor]) -> list[dict[str, Tensor | QTensor]]:
    shards: dict[str, dict[str, Tensor | QTensor]] = {}
    for name, value in tensors.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        shards.setdefault(layer, {})[name] = value
    return list(shards.values())


@torch.no_grad()
def difference(ours: nn.Module, directory: Path) -> float:
    """Largest difference of logits between a model and a checkpoint as transformers loads it."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = ours(IDS).logits
    assert expected.std() > 0.01
    return (theirs(IDS).logits - expected).abs().max().item()


@pytest.mark.parametrize("storage", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["w4a16g32", "w4a16sym", "w3a16g32", "w2a16g32", "w8a16"])
def test_weights(tmp_path: Path, minmax: Quantizer, name: str, storage: torch.dtype) -> None:
    model, scheme = tiny_llama(), Scheme.parse(name)
    tensors = quantize(model, scheme, storage, minmax)
    write(tmp_path / "out", model.config.to_dict(), [tensors], scheme)
    assert difference(model, tmp_path / "out") == 0.0
    dense, expected = load_dense(tmp_path / "out", torch.float32), model.state_dict()
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], value) for name, value in expected.items())


@pytest.mark.parametrize("options", [BIASED, TIED], ids=["biased", "tied"])
def test_variants_in_several_files(tmp_path: Path, minmax: Quantizer, options: dict[str, bool]) -> None:
    model, scheme = tiny_llama(**options), Scheme.parse("w4a16g32")
    tensors = quantize(model, scheme, torch.float16, minmax)
    write(tmp_path / "out", model.config.to_dict(), by_layer(tensors), scheme)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert difference(model, tmp_path / "out") == 0.0


def test_the_comparison_can_fail(tmp_path: Path, minmax: Quantizer) -> None:
    model, scheme = tiny_llama(), Scheme.parse("w4a16g32")
    tensors = quantize(model, scheme, torch.float16, minmax)
    tensors["model.layers.1.mlp.up_proj.weight"].codes[3, 5] ^= 1
    write(tmp_path / "out", model.config.to_dict(), [tensors], scheme)
    assert 0.0 < difference(model, tmp_path / "out") < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_precision(tmp_path: Path, minmax: Quantizer, dtype: torch.dtype) -> None:
    model, scheme = tiny_llama(), Scheme.parse("w3a16g32")
    write(tmp_path / "out", model.config.to_dict(), [quantize(model, scheme, torch.float16, minmax)], scheme)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    theirs(IDS)  # unpacks the weights
    loaded = theirs.state_dict()
    dense = load_dense(tmp_path / "out", dtype)
    assert all(torch.equal(loaded[name], value) for name, value in dense.items())


@pytest.mark.parametrize("name", ["w4a4g32", "w4a8", "w8a8", "w8a8sym"])
def test_activations(tmp_path: Path, minmax: Quantizer, name: str) -> None:
    """The token's largest element lies on a rounding tie, so the scale must be the client's to the last bit."""
    model, scheme = tiny_llama(), Scheme.parse(name)
    grid = scheme.activation
    write(tmp_path / "out", model.config.to_dict(), [quantize(model, scheme, torch.float16, minmax)], scheme)

    def fake_quantize(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x = inputs[0]
        scale, zero = grid_of(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), grid)
        return decode(encode(x, scale, zero, grid), scale, zero)

    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(fake_quantize)
    assert difference(model, tmp_path / "out") == 0.0
