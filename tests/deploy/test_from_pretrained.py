"""``from_pretrained`` gives packed models that answer as the dequantized ones do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deployed import IDS, expected
from helpers import assert_close, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, pipeline

from aq_lightning import deploy
from aq_lightning.attention import attentions
from aq_lightning.deploy import Int4Linear
from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors import LAYOUT_NOTE
from aq_lightning.export.loading import open_model
from aq_lightning.quantizers.activations import quantize_tokens
from aq_lightning.transforms.online import carried

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def enabled():
    with deploy.enabled():
        yield


@torch.no_grad()
def open_packed(directory: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32, **options})


def packed_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int4Linear)]


def tolerance(scheme: str) -> float:
    """Sums have another order, which rounding magnifies: a token's largest activation lies on an edge of its grid."""
    return 1e-6 if "a16" in scheme else 2e-2 if "a8" in scheme else 0.2


@pytest.mark.parametrize(
    "scheme",
    ["w2a16g32", "w3a16g32", "w4a16", "w4a16g32sym", "w8a16", "w4a8", "w4a4g32", "w8a8sym", "w5a16"],
)
@torch.no_grad()
def test_answers_as_the_dequantized_model(checkpoint: Callable[..., Path], scheme: str) -> None:
    directory = checkpoint(scheme)
    model = open_packed(directory)
    assert len(packed_linears(model)) == 14 and type(model.lm_head) is nn.Linear
    assert_close(scheme, expected(directory), model(IDS).logits, tolerance(scheme))


@pytest.mark.parametrize("scheme", ["w4a8g32", "w4a4", "w3a8g32", "w8a8sym"])
@torch.no_grad()
def test_a_linear_rounds_what_it_reads(checkpoint: Callable[..., Path], scheme: str) -> None:
    linear = open_packed(checkpoint(scheme, tiny_llama(attention_bias=True))).model.layers[1].self_attn.k_proj
    x = torch.randn(2, 5, 64)
    read = quantize_tokens(x, linear.scheme.activation)
    reference = nn.functional.linear(read, linear.unpack().dequantize(torch.float32), linear.bias)
    assert_close("packed", reference, linear(x), 1e-6)
    linear.expand()
    assert torch.equal(linear(x), reference)


@pytest.mark.parametrize(
    "name", ["llama-biased", "qwen2", "qwen3", "gemma2", "phi3-partial", "opt", "gpt_neox", "falcon-7b", "bloom"]
)
@torch.no_grad()
def test_every_kind_of_model(checkpoint: Callable[..., Path], name: str) -> None:
    config = tiny_config(name)
    directory = checkpoint("w4a16g32", AutoModelForCausalLM.from_config(config).eval())
    model = open_packed(directory)
    assert_close(name, expected(directory), model(IDS).logits, 1e-6)
    assert_close(f"{name}, joined", expected(directory), deploy.fuse(model)(IDS).logits, 1e-6)


@pytest.mark.parametrize("online", [False, True])
@torch.no_grad()
def test_several_files(checkpoint: Callable[..., Path], online: bool) -> None:
    directory = checkpoint("w4a16g32", files=3, online=online)
    assert len(list(directory.glob("*.safetensors"))) == 3
    assert_close("sharded", expected(directory), open_packed(directory)(IDS).logits, 1e-6)


@torch.no_grad()
def test_a_model_without_its_head(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("w4a16g32", online=True)
    headless = AutoModel.from_pretrained(directory)
    assert len(packed_linears(headless)) == 14 and len(list(carried(headless))) == 2
    whole = open_packed(directory, dtype="auto")
    assert torch.equal(headless(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_one_linear_after_another_is_packed(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held twice but the one at hand."""
    pack, held = Int4Linear.pack, []

    def watched(self: Int4Linear, layout: object) -> None:
        pack(self, layout)
        held.append(sorted(self._buffers))

    monkeypatch.setattr(Int4Linear, "pack", watched)
    open_packed(checkpoint("w4a16g32"))
    assert held == [["scales", "words"]] * 14


@torch.no_grad()
def test_joined_linears_are_fewer(checkpoint: Callable[..., Path]) -> None:
    model = deploy.fuse(open_packed(checkpoint("w4a16g32")))
    assert packed_linears(model.model.layers[0]) == [
        "self_attn.q_proj.joint.linear", "self_attn.o_proj", "mlp.gate_proj.joint.linear", "mlp.down_proj"
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["w4a16g32", "w4a4"])
@torch.no_grad()
def test_online_products_are_included(checkpoint: Callable[..., Path], scheme: str) -> None:
    directory = checkpoint(scheme, online=True)
    with deploy.enabled():
        deploy.disable()
        model = open_packed(directory)  # such a checkpoint names this package itself
    assert len(list(carried(model))) == 2
    assert_close(scheme, expected(directory), model(IDS).logits, tolerance(scheme))
    for _, online in carried(model):
        online[0].inverse.copy_(torch.eye(online[0].inverse.shape[-1]))
    assert (model(IDS).logits - expected(directory)).abs().max() > 1e-3, "negative control"


@pytest.mark.parametrize("scheme", ["w4a16kv4", "w4a4kv3"])
@torch.no_grad()
def test_keys_and_values_are_rounded(checkpoint: Callable[..., Path], scheme: str) -> None:
    directory = checkpoint(scheme, online=True)
    model = open_packed(directory)
    assert_close(scheme, expected(directory), model(IDS).logits, tolerance(scheme))
    for attention in attentions(model):
        attention.attention_hooks = []
    assert (model(IDS).logits - expected(directory)).abs().max() > 1e-3, "negative control"


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a8sym", "w8a8sym"])
def test_what_is_saved_is_what_was_loaded(
    checkpoint: Callable[..., Path], tmp_path: Path, scheme: str, joined: bool
) -> None:
    directory = checkpoint(scheme, tiny_llama(attention_bias=True))
    model = open_packed(directory, dtype="auto")
    (deploy.fuse(model) if joined else model).save_pretrained(tmp_path / "saved")
    (before,), (after,) = directory.glob("*.safetensors"), (tmp_path / "saved").glob("*.safetensors")
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        assert set(old.keys()) == set(new.keys())
        assert all(torch.equal(old.get_tensor(name), new.get_tensor(name)) for name in old.keys())
        assert new.metadata()[LAYOUT_NOTE] == "padded"
    fields = [json.loads((place / "config.json").read_text()) for place in (directory, tmp_path / "saved")]
    assert fields[0]["quantization_config"] == fields[1]["quantization_config"]
    with torch.no_grad():
        assert torch.equal(open_packed(tmp_path / "saved")(IDS).logits, open_packed(directory)(IDS).logits)


def test_saving_online_products_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Under their usual names, transformers without this package would load random weights and only warn."""
    model = open_packed(checkpoint("w4a4", online=True))
    with pytest.raises(RequestError, match="copy the directory"):
        model.save_pretrained(tmp_path / "saved")


@torch.no_grad()
def test_dense_words_are_read_as_their_header_says(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("w3a16g32", layout="dense")
    assert_close("dense", expected(directory), open_packed(directory)(IDS).logits, 1e-6)


@torch.no_grad()
def test_weights_keep_their_precision_wherever_the_model_goes(checkpoint: Callable[..., Path]) -> None:
    model = open_packed(checkpoint("w4a16g32"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("scales")}
    model.to(torch.bfloat16).to("cpu", torch.float32)
    after = dict(model.named_buffers())
    assert before and all(torch.equal(after[name], scales) for name, scales in before.items())
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.to("meta").model.layers[0].mlp.up_proj.words.is_meta


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
@torch.no_grad()
def test_device_map(checkpoint: Callable[..., Path], device_map: object) -> None:
    directory = checkpoint("w4a16g32")
    on_gpu = device_map == "auto" and torch.cuda.is_available()
    model = open_packed(directory, device_map=device_map, dtype=torch.float16 if on_gpu else torch.float32)
    assert model.device.type == ("cuda" if on_gpu else "cpu")
    answer = model(IDS.to(model.device)).logits.cpu().float()
    assert_close("placed", expected(directory), answer, 2e-2 if on_gpu else 1e-6)


def test_offloaded_weights_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(RequestError, match="offloaded"):
        open_packed(checkpoint("w4a16g32"), device_map=placed, offload_folder=tmp_path / "off", offload_buffers=True)


def test_experts_are_refused_by_name(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("w4a16g32")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for part in ("weight_packed", "weight_scale"):
        tensors[f"model.layers.0.mlp.experts.0.up_proj.{part}"] = torch.zeros(4, 4)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RequestError, match="experts"):
        open_packed(directory)


@torch.no_grad()
def test_without_asking_nothing_changes_for_compressed_tensors(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("w4a16g32")
    deploy.disable()
    theirs = open_packed(directory)
    assert not packed_linears(theirs) and theirs.config.quantization_config.quant_method == "compressed-tensors"
    deploy.enable()
    assert packed_linears(open_packed(directory))


@torch.no_grad()
def test_what_is_not_understood_stays_with_compressed_tensors(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("w4a16g32")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["observer"] = "mse"
    config["quantization_config"]["config_groups"]["second"] = config["quantization_config"]["config_groups"]["group_0"]
    (directory / "config.json").write_text(json.dumps(config))
    assert not packed_linears(open_packed(directory))


@torch.no_grad()
def test_dequantized_again(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("w4a16g32")
    model = open_packed(directory).dequantize()
    assert not packed_linears(model) and "quantization_config" not in model.config.to_dict()
    assert_close("dequantized", expected(directory), model.float()(IDS).logits, 1e-6)


@pytest.mark.parametrize("scheme, online", [("w4a16g32", False), ("w4a8", True), ("w4a16kv4", True)])
@torch.no_grad()
def test_compiles_as_one_graph(checkpoint: Callable[..., Path], scheme: str, online: bool) -> None:
    directory = checkpoint(scheme, online=online)
    model = deploy.fuse(open_packed(directory))
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # nothing is left from the first call
        assert_close("compiled", expected(directory), compiled(IDS, use_cache=False).logits, tolerance(scheme))


@torch.no_grad()
def test_generates(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("w4a16g32")
    model, reference = open_packed(directory), open_model(str(directory), torch.float32)[0]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(IDS[:1], **options)
    assert torch.equal(answer, reference.generate(IDS[:1], **options))
    assert torch.equal(answer, deploy.fuse(model).generate(IDS[:1], cache_implementation="static", **options))


def test_pipelines(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("w4a16g32")
    options = {"max_new_tokens": 5, "do_sample": False}
    speak = pipeline("text-generation", model=str(directory), dtype=torch.float32, device="cpu")
    assert packed_linears(speak.model)
    (answer,) = speak("word3 word14 word15", **options)
    reference = open_model(str(directory), torch.float32)[0]
    (same,) = pipeline("text-generation", model=reference, tokenizer=speak.tokenizer)("word3 word14 word15", **options)
    assert answer == same and answer["generated_text"].count("word") == 8


@pytest.mark.parametrize("scheme", ["w4a16g32", "w4a8"])
@torch.no_grad()
def test_opened_for_a_cpu_its_weights_are_expanded(checkpoint: Callable[..., Path], scheme: str) -> None:
    directory = checkpoint(scheme, online=True)
    model, _ = deploy.load(str(directory), torch.device("cpu"))
    assert all("dense" in dict(model.get_submodule(name).named_buffers()) for name in packed_linears(model))
    assert not [name for name in model.state_dict() if name.endswith("dense")]
    assert_close(scheme, expected(directory), model(IDS).logits, 1e-6)
