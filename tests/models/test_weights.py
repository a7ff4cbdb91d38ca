"""Models are read block by block as transformers reads them whole, or whole where that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama, word_tokenizer
from safetensors.torch import load_file, save_file
from tiny import MODELS, tiny
from torch import Tensor, nn
from transformers import GenerationConfig

from aq_lightning.errors import RequestError
from aq_lightning.models import loading
from aq_lightning.models.ahead import read_ahead
from aq_lightning.models.loading import Pretrained, Source, load, load_model
from aq_lightning.models.weights import StoredTensors


def tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: each for name, each in [*module.named_parameters(), *module.named_buffers()]}


def pieces(pretrained: Pretrained) -> dict[str, Tensor]:
    """Everything that a model gives out, part by part."""
    result = tensors(pretrained.shell())
    for index in range(len(pretrained.blocks)):
        result |= tensors(pretrained.block(index), f"{pretrained.architecture.blocks}.{index}.")
    return result


def assert_same(pretrained: Pretrained, directory: Path) -> None:
    """Every parameter and buffer, to the bit, and the configuration."""
    reference = load_model(Source(str(directory)))
    expected, actual = tensors(reference), pieces(pretrained)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
        assert not actual[name].requires_grad
    for part in ("config", "generation_config"):
        assert getattr(reference, part).to_dict() == getattr(pretrained.model, part).to_dict()
    assert reference.config._attn_implementation == pretrained.model.config._attn_implementation


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model with a generation configuration of its own."""
    model = tiny_llama()
    model.generation_config = GenerationConfig(top_k=7, do_sample=True)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def changed(saved: Path) -> Callable[[Callable[[dict[str, Tensor]], dict[str, Tensor]]], Path]:
    """Its directory with other tensors."""

    def change(how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        file = saved / "model.safetensors"
        save_file({name: tensor.clone() for name, tensor in how(load_file(file)).items()}, file, {"format": "pt"})
        return saved

    return change


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """From several files, of which none holds a block alone; nothing stays in the model."""
    tiny(name, torch.float32).model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40kB")
    word_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    pretrained = load(str(tmp_path))
    assert not pretrained.whole and pretrained.storage == torch.bfloat16
    assert_same(pretrained, tmp_path)
    assert all(parameter.is_meta for parameter in pretrained.model.parameters())
    inside = {id(module) for block in pretrained.shell().get_submodule(pretrained.architecture.blocks)
              for module in block.modules() if list(module.parameters())}  # fmt: skip
    assert not inside, "a shell's blocks are hollow"


def test_a_block_is_new_at_each_call(saved: Path) -> None:
    pretrained = load(str(saved))
    first = pretrained.block(1)
    first.mlp.up_proj.weight.zero_()
    assert pretrained.block(1).mlp.up_proj.weight.any()


def test_single_file(saved: Path) -> None:
    pretrained = load(str(saved))
    assert not pretrained.whole
    assert_same(pretrained, saved)


def test_names_without_the_causal_models_prefix(changed: Callable[..., Path]) -> None:
    """As base models are published."""
    directory = changed(lambda tensors: {name.removeprefix("model."): each for name, each in tensors.items()})
    (directory / "generation_config.json").unlink()
    weights = set(StoredTensors(directory))
    assert "layers.0.mlp.up_proj.weight" in weights
    pretrained = load(str(directory))
    assert not pretrained.whole
    assert torch.equal(pretrained.block(1).mlp.up_proj.weight, StoredTensors(directory)["layers.1.mlp.up_proj.weight"])


def test_tensors_that_the_model_has_not_are_left_alone(changed: Callable[..., Path]) -> None:
    """Rotary frequencies, in checkpoints of old."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    directory = changed(lambda tensors: tensors | extra)
    pretrained = load(str(directory))
    assert not pretrained.whole
    assert_same(pretrained, directory)


def test_dtype_that_the_configuration_does_not_name(changed: Callable[..., Path]) -> None:
    directory = changed(lambda tensors: {name: each.half() for name, each in tensors.items()})
    config = json.loads((directory / "config.json").read_text())
    config.pop("dtype")
    (directory / "config.json").write_text(json.dumps(config))
    pretrained = load(str(directory))
    assert pretrained.storage == torch.float16 and not pretrained.whole
    assert_same(pretrained, directory)


def test_a_tensor_that_is_missing_is_refused(changed: Callable[..., Path]) -> None:
    directory = changed(lambda tensors: {name: each for name, each in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(RequestError, match="describes the weights beside it"):
        load(str(directory))


def test_tied_tensors_that_differ_are_read_whole(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert "Tied tensors are equal" in load(str(tmp_path)).whole


def test_another_shape_is_refused(changed: Callable[..., Path]) -> None:
    directory = changed(lambda tensors: tensors | {"model.layers.1.mlp.up_proj.weight": torch.ones(300, 64)})
    pretrained = load(str(directory))
    assert pretrained.block(0) is not None
    with pytest.raises(RequestError, match=r"mlp.up_proj.weight.*\(300, 64\)"):
        pretrained.block(1)


def test_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are fetched one by one, the index before the shards."""
    fetched = []

    def cached_file(name: str, file: str) -> str:
        fetched.append(file)
        if not (saved / file).is_file():
            raise OSError(f"{name} does not have {file}")
        return str(saved / file)

    monkeypatch.setattr(loading, "cached_file", cached_file)
    config = loading.load_config(Source(str(saved)))
    assert set(loading._stored(Source("some/model"), config)) == set(load_file(saved / "model.safetensors"))
    assert fetched == ["model.safetensors.index.json", "model.safetensors"]
    (saved / "model.safetensors").unlink()
    tiny_llama().save_pretrained(saved, max_shard_size="100kB")
    fetched.clear()
    assert len(loading._stored(Source("some/model"), config)) > 9
    assert fetched == ["model.safetensors.index.json", *sorted(path.name for path in saved.glob("*.safetensors"))]


def test_values_are_read_one_ahead() -> None:
    read = []
    values = read_ahead(lambda key: read.append(key) or -key, range(5))
    for key, value in enumerate(values):
        assert value == -key and len(read) <= key + 2
    assert read == list(range(5)) and list(read_ahead(abs, [])) == []


def test_a_value_that_cannot_be_read_ends_the_reading() -> None:
    values = read_ahead(lambda key: 1 // key, [1, 0, 1])
    assert next(values) == 1
    with pytest.raises(ZeroDivisionError):
        next(values)
