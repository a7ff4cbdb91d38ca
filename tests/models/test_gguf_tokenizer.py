"""Tokenizers as GGUF says them, each as transformers reads it back or as the libraries spell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2 import tokenization_qwen2

from aq_lightning.errors import RequestError
from aq_lightning.models.gguf_tokenizer import tokenizer_metadata

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "▁a", "ab", "▁ab"]
MERGES = [("▁", "a"), ("a", "b"), ("▁a", "b")]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def saved(backend: Tokenizer, directory: Path) -> list[Path]:
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return sorted(directory.iterdir())


def pieces() -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    backend = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def test_pieces_merge_by_score(tmp_path: Path) -> None:
    found = tokenizer_metadata(saved(pieces(), tmp_path), len(PIECES) + 2)
    assert found["ggml.model"] == "llama" and found["ggml.add_space_prefix"] and not found["ggml.add_bos_token"]
    assert found["ggml.tokens"] == [*PIECES, f"[PAD{len(PIECES)}]", f"[PAD{len(PIECES) + 1}]"]
    assert found["ggml.token_type"] == [2, 3, 3, *([6] * 256), *([1] * 7), 5, 5]
    assert found["ggml.scores"][-5:] == [-1.0, -2.0, -3.0, 0.0, 0.0]
    assert [found[f"ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]


@pytest.mark.parametrize(
    "steps, pre",
    [
        ([pre_tokenizers.ByteLevel()], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()], "smollm"),
        (LLAMA_3, "llama-bpe"),
        (tokenization_qwen2.PRETOKENIZE_REGEX, "qwen2"),
    ],
)
def test_how_words_are_cut(tmp_path: Path, steps: list | str, pre: str) -> None:
    backend = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, []))
    if isinstance(steps, str):
        split = pre_tokenizers.Split(Regex(steps), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    assert tokenizer_metadata(saved(backend, tmp_path), 4)["ggml.pre"] == pre


def test_refusals(tmp_path: Path) -> None:
    files = saved(pieces(), tmp_path)
    with pytest.raises(RequestError, match="a row in the embedding of 2, got </s> at 2"):
        tokenizer_metadata(files, 2)
    backend = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(RequestError, match=r"how a tokenizer cuts text into words \(gpt-2, smollm.*got \('Whitespace'"):
        tokenizer_metadata(saved(backend, tmp_path / "other"), 4)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["type"] = "Unigram"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match="byte-pair encoding, got Unigram"):
        tokenizer_metadata(files, len(PIECES))
