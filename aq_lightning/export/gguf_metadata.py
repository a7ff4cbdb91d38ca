"""What a GGUF file says of a model beside its weights, and how it names and arranges them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aq_lightning.errors import RequestError
from aq_lightning.export.base import Subject
from aq_lightning.models import lookup
from aq_lightning.models.gguf import ARCHITECTURES, TENSORS, GgufArchitecture
from aq_lightning.models.gguf_tokenizer import tokenizer_metadata
from aq_lightning.qtensor import QTensor

_PLAIN_ROTARY = "default"
_FACTORS = re.compile(r"\D+3")  # the one rotary scaling that is a factor for each frequency, whatever the length
_BLOCK = re.compile(r"\d+")


def architecture_of(subject: Subject) -> GgufArchitecture:
    """
    Raises:
        RequestError: the model type is not one that is written.
    """
    model_type = subject.config["model_type"]
    if model_type not in ARCHITECTURES:
        raise RequestError(
            f"GGUF is written for {', '.join(ARCHITECTURES)} here, got {model_type}: export another format, or `dense` "
            "and convert that with llama.cpp's own script."
        )
    return ARCHITECTURES[model_type]


def check_metadata(subject: Subject) -> None:
    """
    Raises:
        RequestError: the architecture is not written, has biases that llama.cpp's graph does not read, or a rotary
            embedding that cannot be said.
    """
    config = subject.model_config
    known, switches = architecture_of(subject), lookup.architecture_of(config).bias_switches
    unread = [name for name in switches if getattr(config, name, False) and name not in known.switches]
    if unread:
        raise RequestError(
            f"llama.cpp's graph of {known.name} reads no biases of {unread[0]}, got them switched on (a shift gains "
            "them): calibrate without Shift, or export another format."
        )
    kind = _rotary_kind(config)
    if kind != _PLAIN_ROTARY and not _FACTORS.fullmatch(kind):
        raise RequestError(f"GGUF is written for plain and factor-wise rotary embedding, got {kind}: export another "
                           "format.")  # fmt: skip


def add_metadata(writer: gguf.GGUFWriter, subject: Subject, file_type: int) -> None:
    """Everything but the weights; the tokenizer if its files are among the subject's."""
    config = subject.model_config
    heads = lookup.heads_of(config, lookup.architecture_of(config))
    writer.add_name(f"{config.model_type} {subject.scheme}")  # the type alone makes transformers look for one it lacks
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    window = getattr(config, "sliding_window", None)  # llama.cpp attends to everything: the same up to the window
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads.query)
    writer.add_head_count_kv(heads.key_value)
    writer.add_key_length(heads.size)
    writer.add_value_length(heads.size)
    writer.add_rope_dimension_count(heads.size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if _rotary_kind(config) != _PLAIN_ROTARY:
        plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, heads.size, 2) / heads.size)
        scaled, _ = ROPE_INIT_FUNCTIONS[_rotary_kind(config)](config, torch.device("cpu"))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy().astype(np.float32))
    if subject.files:
        for key, value in tokenizer_metadata(subject.files, config.vocab_size).items():
            _add(writer, f"tokenizer.{key}", value)


def gguf_name(name: str) -> str:
    """The name in GGUF of a tensor of transformers.

    Raises:
        RequestError: there is none.
    """
    found = _translate(name, dict(TENSORS))
    if found is None:
        raise RequestError(f"GGUF has a name for every tensor, got none for {name}: export another format.")
    return found


def hf_name(name: str) -> str | None:
    """The inverse of :func:`gguf_name`; None for tensors that transformers computes instead."""
    return _translate(name, {theirs: ours for ours, theirs in TENSORS.items()})


def rotary(
    tensor: QTensor | Tensor, name: str, source: Subject | gguf.GGUFReader, *, back: bool = False
) -> QTensor | Tensor:
    """A tensor whose rows are queries or keys, from rotary pairs half a head apart to pairs side by side, or back.

    Others, and those of architectures that keep transformers' order, are left as they are.
    """
    permuted, heads = _permuted(source)
    module = name.rpartition(".")[0]
    place = next((index for index, end in enumerate(permuted) if module.endswith(end)), None)
    if place is None:
        return tensor
    if isinstance(tensor, QTensor):
        parts = {part: _rows(getattr(tensor, part), heads[place], back) for part in ("codes", "scale", "zero")}
        return replace(tensor, **parts)
    return _rows(tensor, heads[place], back)


def _rows(x: Tensor, heads: int, back: bool) -> Tensor:
    """(rows, …) with each head's rows (2, pairs) made (pairs, 2), or back."""
    halves = (-1, 2) if back else (2, -1)
    return x.unflatten(0, (heads, *halves)).transpose(1, 2).flatten(0, 2).contiguous()


def _permuted(source: Subject | gguf.GGUFReader) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Modules whose rows move, and the heads of queries and keys."""
    if isinstance(source, Subject):
        config = source.model_config
        heads = lookup.heads_of(config, lookup.architecture_of(config))
        return architecture_of(source).permuted, (heads.query, heads.key_value)
    kind = source.fields["general.architecture"].contents()
    permuted = next(known.permuted for known in ARCHITECTURES.values() if known.name == kind)
    query, key_value = (source.fields[f"{kind}.attention.head_count{end}"].contents() for end in ("", "_kv"))
    return permuted, (int(query), int(key_value))


def _translate(name: str, table: dict[str, str]) -> str | None:
    module, _, leaf = name.rpartition(".")
    number = _BLOCK.search(module)
    theirs = table.get(_BLOCK.sub("*", module, count=1))
    return None if theirs is None else f"{theirs.replace('*', number[0] if number else '')}.{leaf}"


def _rotary_kind(config: Any) -> str:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", _PLAIN_ROTARY)


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
