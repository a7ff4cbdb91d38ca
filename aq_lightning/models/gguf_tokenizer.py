"""A tokenizer as GGUF metadata: vocabulary, merges or scores, special tokens, chat template.

llama.cpp has two tokenizers that models of transformers use: ``gpt2``, byte-level byte-pair encoding whose merges are
listed, with one of several rules that cut text into words (``pre``); and ``llama``, SentencePiece's byte-pair encoding,
which merges the pair whose result has the greatest score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from aq_lightning.errors import RequestError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama_token_type
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE = {
    ("ByteLevel regex",): "gpt-2",
    ("Digits", "ByteLevel regex"): "smollm",
    (_LETTERS + r"\p{N}{1,3}" + _OTHERS, "ByteLevel"): "llama-bpe",
    (_LETTERS + r"\p{N}" + _OTHERS, "ByteLevel"): "qwen2",
}
"""What cuts text into words, in order → its name in llama.cpp."""


def tokenizer_metadata(files: Sequence[Path], size: int) -> dict[str, Any]:
    """Metadata of a tokenizer's files, by key without the prefix ``tokenizer.``.

    Args:
        files: the model's small files, ``tokenizer.json`` among them.
        size: of the model's vocabulary; tokens that the tokenizer does not have are marked unused.

    Raises:
        RequestError: there is no ``tokenizer.json``, or llama.cpp has no tokenizer of its kind.
    """
    paths = {path.name: path for path in files}
    if "tokenizer.json" not in paths:
        raise RequestError(
            f"GGUF holds the tokenizer of a tokenizer.json, got {', '.join(sorted(paths)) or 'no files'}: save the "
            "model's fast tokenizer beside the checkpoint."
        )
    content = json.loads(paths["tokenizer.json"].read_text(encoding="utf-8"))
    config = _json(paths.get("tokenizer_config.json"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise RequestError(
            f"llama.cpp has tokenizers of byte-pair encoding, got {model.get('type')}: export another format."
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, kinds = _tokens(content, size)
    if model.get("byte_fallback"):
        found = {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": _scores(tokens, merges)}
        found["ggml.add_space_prefix"] = _prefixed(content)
    else:
        found = {"ggml.model": "gpt2", "ggml.pre": _pre(content), "ggml.merges": merges}
    found |= {"ggml.tokens": tokens, "ggml.token_type": kinds}
    identity = {token: index for index, token in enumerate(tokens)}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if token in identity:
            found[f"ggml.{name}_token_id"] = identity[token]
    starts = Tokenizer.from_file(str(paths["tokenizer.json"])).encode("a").ids[:1]
    found["ggml.add_bos_token"] = starts == [found.get("ggml.bos_token_id", -1)]
    template = paths.get("chat_template.jinja")
    template = template.read_text(encoding="utf-8") if template else config.get("chat_template")
    return found | ({"chat_template": template} if isinstance(template, str) else {})


def _tokens(content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token of the model's vocabulary, and its kind."""
    vocabulary = content["model"]["vocab"]
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    given = {added["content"]: added["id"] for added in content["added_tokens"]}
    for token, index in (vocabulary | given).items():
        if index >= size:
            raise RequestError(f"A token has a row in the embedding of {size}, got {token} at {index}: resize the "
                               "model's embedding.")  # fmt: skip
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[index], kinds[index] = token, _BYTE if is_byte else _NORMAL
    for added in content["added_tokens"]:
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    unknown = vocabulary.get(content["model"].get("unk_token"))
    if unknown is not None:
        kinds[unknown] = _UNKNOWN
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """The earlier two parts merge, the greater the score of the whole; what no merge makes has none."""
    made: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        made.setdefault(pair.replace(" ", "", 1), -float(rank + 1))
    return [made.get(token, 0.0) for token in tokens]


def _pre(content: Mapping[str, Any]) -> str:
    step = content.get("pre_tokenizer") or {}
    steps = tuple(_cut(part) for part in step.get("pretokenizers", [step]))
    if steps not in _PRE:
        raise RequestError(
            f"llama.cpp must know how a tokenizer cuts text into words ({', '.join(_PRE.values())} are written here), "
            f"got {steps}: convert this tokenizer with llama.cpp's own script."
        )
    return _PRE[steps]


def _cut(step: Mapping[str, Any]) -> str:
    kind = str(step.get("type"))
    if kind == "Split":
        return str(step["pattern"].get("Regex"))
    return f"{kind} regex" if kind == "ByteLevel" and step.get("use_regex", True) else kind


def _prefixed(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer, cut = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = [normalizer, *normalizer.get("normalizers", ())]
    return cut.get("prepend_scheme", "never") != "never" or any(step.get("type") == "Prepend" for step in steps)


def _json(path: Path | None) -> dict[str, Any]:
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))
