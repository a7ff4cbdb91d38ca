"""From a directory or a hub id to a model that can be scored: as transformers loads it where that can be, otherwise as
this package reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aq_lightning.errors import RequestError
from aq_lightning.evaluation import effective_bits, fits, overhead, stored_bits
from aq_lightning.experts import run_here
from aq_lightning.export import clients
from aq_lightning.export.base import Subject
from aq_lightning.export.compressed_tensors import LAYOUT_NOTE, read
from aq_lightning.export.directory import read_config
from aq_lightning.export.loading import open_parts
from aq_lightning.models.loading import Source, load_config, load_model, load_tokenizer, locate, reading, skeleton
from aq_lightning.models.weights import StoredTensors
from aq_lightning.scheme import Scheme
from aq_lightning.scoring.answers import Answers, BlockByBlock, Whole

Loader = Literal["auto", "transformers", "own"]
"""Who reads a checkpoint: transformers wherever it reads the format and memory holds the model, or always, or never."""


@dataclass(frozen=True)
class Opened:
    """A model to score."""

    name: str
    """As it was asked for."""
    answers: Answers
    tokenizer: PreTrainedTokenizerBase
    bits: float
    """Effective bits per weight of the linears in its blocks; NaN: not known."""
    overhead: float
    """Multiply–adds per token of online products, in percent of those of the linears in the blocks."""
    reader: str
    """Who loaded it, and why it was not transformers."""


@dataclass(frozen=True)
class Opening:
    """How models are opened."""

    device: torch.device
    """Where they compute."""
    place: str = "device"
    """Where the activations between blocks are kept."""
    loader: Loader = "auto"
    trust_remote_code: bool = False

    def open(self, pretrained: str) -> Opened:
        """Any causal language model by its directory or id.

        Raises:
            RequestError: it is no such model, or cannot be read.
        """
        source = locate(pretrained)
        config = load_config(source, self.trust_remote_code)
        check_causal(config, pretrained)
        tokenizer = load_tokenizer(source, self.trust_remote_code)
        method = None if source.gguf_file else quantization_of(config)
        if method is None:
            return self._plain(pretrained, source, config, tokenizer)
        directory = Path(source.location).expanduser()
        if directory.is_dir() and method in ("compressed-tensors", "aq_lightning"):
            opened = self._own_format(pretrained, directory, config, tokenizer)
            if opened is not None:
                return opened
        if self.loader == "own":
            raise RequestError(
                f"This package reads checkpoints as it writes them, got {pretrained!r} ({method}): use auto."
            )
        model = _loaded(source, trust_remote_code=self.trust_remote_code, device_map=self.device)
        answers = Whole(model, self.device)
        return Opened(pretrained, answers, tokenizer, _bits_in_files(directory, config), 0.0, "transformers")

    def _plain(
        self, pretrained: str, source: Source, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> Opened:
        """A model in full precision; both ways are transformers' own code on the same tensors, in float32."""
        large = not fits(skeleton(_without_quantization(config), self.trust_remote_code), self.device)
        wanted = self.loader == "own" or (large and self.loader == "auto")
        opened = open_parts(pretrained, self.trust_remote_code) if wanted else None
        if opened is not None:
            model, _ = opened
            answers = BlockByBlock(model, None, self.device, self.place)
            return Opened(
                pretrained, answers, tokenizer, torch.finfo(model.storage).bits, 0.0, "this package, block by block"
            )
        model = load_model(source, trust_remote_code=self.trust_remote_code)
        run_here(model.config)
        bits = torch.finfo(model.dtype).bits
        model = model if large else _wide(model)
        return Opened(pretrained, Whole(model, self.device), tokenizer, bits, 0.0, "transformers")

    def _own_format(
        self, pretrained: str, directory: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> Opened | None:
        """A checkpoint of the format that is written here; None: another of that name, which transformers may read."""
        try:
            scheme, checkpoint = read(directory)
        except RequestError:
            if self.loader == "own" or quantization_of(config) != "compressed-tensors":
                raise
            return None
        bits = effective_bits(checkpoint)
        why = "as asked for" if self.loader == "own" else self._against_transformers(directory, config, scheme)
        if not why:
            answers = Whole(_decompressed(locate(pretrained)), self.device)
            return Opened(pretrained, answers, tokenizer, bits, 0.0, "transformers")
        if self.loader == "transformers":
            raise RequestError(f"transformers is to read {pretrained!r}, and cannot ({why}): leave out --loader.")
        model, _ = open_parts(pretrained, self.trust_remote_code)
        answers = BlockByBlock(model, scheme, self.device, self.place)
        share = overhead(model.blocks).percent
        return Opened(pretrained, answers, tokenizer, bits, share, f"this package, block by block ({why})")

    def _against_transformers(self, directory: Path, config: PreTrainedConfig, scheme: Scheme) -> str:
        """Why transformers does not read a checkpoint of ours; nothing if it does."""
        client = _client(directory, quantization_of(config), scheme)
        if isinstance(client, str):
            return client
        if client.tolerance:
            return "transformers reads some of its linears in a way of its own"
        fit = fits(skeleton(_without_quantization(config)), self.device)
        return "" if fit or self.loader == "transformers" else "too large for the memory at once"


def check_causal(config: PreTrainedConfig, pretrained: str) -> None:
    """
    Raises:
        RequestError: the model predicts no next token.
    """
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = remote or config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not known or config.is_encoder_decoder or getattr(config, "is_decoder", None) is False:
        kind = "encoder–decoder" if config.is_encoder_decoder else "encoder"
        raise RequestError(
            f"Perplexity, divergence and tasks are of models that predict the next token, got {pretrained!r}, "
            f"an {kind} of type {config.model_type}: score it on a task of its own."
        )


def quantization_of(config: PreTrainedConfig) -> str | None:
    """The ``quant_method`` of a configuration; None: full precision."""
    section = getattr(config, "quantization_config", None)
    if section is None:
        return None
    fields = section if isinstance(section, Mapping) else section.to_dict()
    return str(fields.get("quant_method", ""))


def _without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    plain = deepcopy(config)
    if quantization_of(config) is not None:
        del plain.quantization_config
    return plain


def _loaded(source: Source, **options: object) -> PreTrainedModel:
    """A model as transformers loads it, quantized in any way that it understands.

    Raises:
        RequestError: it does not, or it finds no values for some tensors, which it would make up.
    """
    with reading(source), clients.quietly():
        model, report = AutoModelForCausalLM.from_pretrained(
            source.location, dtype="auto", output_loading_info=True, **options
        )
    missing = sorted(set(report["missing_keys"]) - set(model.all_tied_weights_keys))
    if missing:
        raise RequestError(
            f"transformers finds every tensor of a model that it reads, got {source.location!r} without "
            f"{', '.join(missing[:3])}: look for the version of the package that wrote it."
        )
    return model.eval().requires_grad_(False)


def _decompressed(source: Source) -> PreTrainedModel:
    """transformers' model, its weights dequantized in the checkpoint's dtype as engines do, then widened to float32."""
    model = _loaded(source)
    with reading(source), clients.quietly(), torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))  # the first pass decompresses
    return _wide(model).requires_grad_(False)


def _wide(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():  # alone: rotary tables are buffers and keep their own precision
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    return model


def _client(directory: Path, method: str, scheme: Scheme) -> clients.Client | str:
    """transformers as the reader of a checkpoint that this package reads too, or why it is not."""
    if method != "compressed-tensors":
        return "it holds online products"
    config = read_config(directory)
    section = config.pop("quantization_config")
    tensors = StoredTensors(directory)
    packed = next((name for name in tensors if name.endswith("_packed")), None)
    layout = "padded" if packed is None else tensors.metadata(packed).get(LAYOUT_NOTE, "dense")
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    return clients.compressed_tensors(Subject(config, scheme, dtype, section.get("ignore", ())), layout)


def _bits_in_files(directory: Path, config: PreTrainedConfig) -> float:
    if not directory.is_dir():
        return math.nan
    model = skeleton(_without_quantization(config))
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return stored_bits(StoredTensors(directory), linears)
