"""Opening any model for evaluation: an ordinary one, or a checkpoint that was written here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from aq_lightning.errors import RequestError
from aq_lightning.experts import run_here
from aq_lightning.export.compressed_tensors import DenseTensors, load_dense, read
from aq_lightning.models.files import check_numbers, read_object
from aq_lightning.models.loading import (
    Pretrained,
    Source,
    load,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    reading,
    skeleton,
)
from aq_lightning.models.lookup import architecture_of
from aq_lightning.models.naming import from_checkpoint
from aq_lightning.models.weights import Weights
from aq_lightning.scheme import Scheme
from aq_lightning.transforms.online import carrier, carry_stored


def open_model(
    pretrained: str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Scheme | None]:
    """A causal language model on the CPU, its tokenizer, and the scheme if it is quantized.

    Quantized weights are dequantized into an ordinary model, without any other package; its modules carry the online
    products that the checkpoint holds. Quantization of activations, keys and values is for the caller to apply
    (:func:`aq_lightning.quantizers.quantized`).

    Args:
        pretrained: directory, hub id or ``embedded``.
        dtype: of the parameters; ``auto``: as stored.
        trust_remote_code: whether code from the hub may run.

    Raises:
        RequestError: the model cannot be found or read, or is quantized in a way that is not understood here.
    """
    source = locate(pretrained)
    tokenizer = load_tokenizer(source, trust_remote_code)
    directory = Path(source.location).expanduser()
    if source.gguf_file or not _is_quantized(directory):
        return load_model(source, dtype, trust_remote_code), tokenizer, None
    with reading(source):
        scheme, _ = read(directory)
        return _dense(source, directory, dtype, trust_remote_code), tokenizer, scheme


def _dense(source: Source, directory: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a quantized checkpoint, dequantized."""
    config = load_config(source, trust_remote_code)
    dtype = config.dtype if dtype == "auto" else dtype
    del config.quantization_config
    tensors = load_dense(directory, dtype)
    check_numbers(skeleton(config), sum(tensor.numel() for tensor in tensors.values()), source.location)
    return model_of(config, tensors, dtype, trust_remote_code)


def model_of(
    config: PreTrainedConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """An ordinary model with the tensors of a checkpoint, dequantized.

    Raises:
        RequestError: tensors are missing or unknown.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    run_here(model.config)
    tensors = from_checkpoint(tensors, architecture_of(config))
    carry_stored(model, {name: tensor for name, tensor in tensors.items() if carrier(name)})
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    absent = set(missing) - set(model.all_tied_weights_keys)
    if absent or unexpected:
        raise RequestError(
            f"A checkpoint holds exactly its model's tensors, got {sorted(absent)[:3]} missing and "
            f"{sorted(unexpected)[:3]} unknown: write it again."
        )
    return model.eval().requires_grad_(False)


def open_parts(pretrained: str, trust_remote_code: bool = False) -> tuple[Pretrained, Scheme | None] | None:
    """A model as :func:`open_model` reads it, block by block, and the scheme if it is quantized; None: it can only be
    read whole, for its blocks are not known or not plain.

    Raises:
        RequestError: see :func:`open_model`.
    """
    source = locate(pretrained)
    directory = Path(source.location).expanduser()
    if not source.gguf_file and _is_quantized(directory):
        with reading(source):
            return _dequantized(source, directory, trust_remote_code)
    config = load_config(source, trust_remote_code)
    if source.gguf_file is None and getattr(config, "quantization_config", None) is not None:
        return None
    try:
        architecture_of(config)
    except RequestError:
        return None
    return load(pretrained, trust_remote_code), None


def _dequantized(source: Source, directory: Path, trust_remote_code: bool) -> tuple[Pretrained, Scheme]:
    scheme, checkpoint = read(directory)
    config = load_config(source, trust_remote_code)
    del config.quantization_config
    architecture = architecture_of(config)
    model = skeleton(config, trust_remote_code)
    run_here(model.config)
    dense = DenseTensors(checkpoint, config.dtype)
    carry_stored(model, {name: dense[name].to("meta") for name in dense if carrier(name)})
    weights = Weights(dense, model, architecture)
    unknown = sorted(weights.unknown())
    if unknown:
        raise RequestError(
            f"A checkpoint holds exactly its model's tensors, got {unknown[:3]} unknown in {source.location!r}: write "
            "it again."
        )
    return Pretrained(source, model, load_tokenizer(source, trust_remote_code), architecture, weights), scheme


def _is_quantized(directory: Path) -> bool:
    config = directory / "config.json"
    return config.is_file() and "quantization_config" in read_object(config)
